"""The trackers: aim, and those that accelerate supports. The only file that imports aim.

Every tracker gets the facts of a stage, its metrics by step, and the load of the machine. Each has its own client, which takes
its credentials from the environment.
"""

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

TrackerName = Literal["aim", "tensorboard", "wandb", "trackio", "swanlab"]
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)
NOT_TRACKED = frozenset({"time", "step", "steps", "note", "unit", "done", "total", "flops_per_token", "peak_flops"})
SYSTEM_SECONDS = 10.0  # between two measurements of the machine's load


class Tracker(Protocol):
    """One stage in one tracker."""

    def track(self, values: Mapping[str, float], *, step: int | None, subset: str) -> None:
        """Logs the values of one step; `subset` is train, validation or system."""

    def close(self) -> None:
        """Flushes and ends the run."""


def resolve_trackers(names: Sequence[TrackerName] | Literal["auto"]) -> list[TrackerName]:
    """The trackers to use; "auto" is aim if it is installed."""
    if names != "auto":
        return list(names)
    return ["aim"] if find_spec("aim") else []


def open_tracker(name: TrackerName, cache: Path, facts: Mapping[str, Any]) -> Tracker:
    """The tracker `name` with a new run; errors of its client pass through."""
    return AimTracker(cache / "aim", facts) if name == "aim" else AccelerateTracker(name, cache / name, facts)


class AimTracker:
    """A stage as an aim run. All runs of a recipe share one experiment, so that their curves can be overlaid."""

    def __init__(self, repo: Path, facts: Mapping[str, Any]) -> None:
        from aim.sdk.run import Run

        repo.mkdir(parents=True, exist_ok=True)
        self._run = Run(repo=str(repo), experiment=facts["recipe"], capture_terminal_logs=False, system_tracking_interval=None)
        self._run.name = f"{facts['recipe']}/{facts['stage']} {str(facts['key'])[:8]}"  # which tells reruns apart
        for name, value in facts.items():
            self._run[name] = value

    def track(self, values: Mapping[str, float], *, step: int | None, subset: str) -> None:
        """Logs each value as its own sequence."""
        for name, value in values.items():
            self._run.track(value, name=name, step=step, context={"subset": subset})

    def close(self) -> None:
        """Ends the run and adds it to aim's index, which otherwise only the server of `aim up` does."""
        from aim.sdk.index_manager import RepoIndexManager

        self._run.close()
        RepoIndexManager.get_index_manager(self._run.repo).index(self._run.hash)


class AccelerateTracker:
    """A stage in one of accelerate's trackers."""

    def __init__(self, name: str, folder: Path, facts: Mapping[str, Any]) -> None:
        from accelerate import PartialState, tracking

        PartialState(cpu=True)  # accelerate's trackers read from it whether they are the main process
        title = f"{facts['stage']}-{str(facts['key'])[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        made: Any = tracking.LOGGER_TYPE_TO_CLASS[name]
        match name:
            case "tensorboard":
                self._tracker = made(f"{facts['recipe']}/{title}", logging_dir=str(folder))
            case "wandb":
                self._tracker = made(facts["recipe"], name=title, group=facts["stage"], dir=str(folder))
            case "swanlab":
                self._tracker = made(facts["recipe"], experiment_name=title, logdir=str(folder))
            case _:
                self._tracker = made(facts["recipe"], name=title, group=facts["stage"])
        self._tracker.start()
        self._tracker.store_init_configuration(dict(_flat(facts)))
        self._last = 0  # step; some trackers refuse a smaller one

    def track(self, values: Mapping[str, float], *, step: int | None, subset: str) -> None:
        """Logs all values of a step at once."""
        self._last = max(self._last, step or 0)
        self._tracker.log({f"{subset}/{name}": value for name, value in values.items()}, step=self._last)

    def close(self) -> None:
        """Sends the rest and ends the run."""
        self._tracker.finish()


class Machine:
    """The load of this machine's processor, memory and GPUs, measured every SYSTEM_SECONDS."""

    def __init__(self) -> None:
        self._measured = 0.0

    def measure(self) -> dict[str, float]:
        """Load in percent; empty if the last measurement is recent."""
        now = time.monotonic()
        if now - self._measured < SYSTEM_SECONDS:
            return {}
        self._measured = now
        import psutil

        found = {"cpu_percent": float(psutil.cpu_percent()), "memory_percent": float(psutil.virtual_memory().percent)}
        return found | _gpus()


def _gpus() -> dict[str, float]:
    """The load of each GPU as nvidia-smi reports it; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
    found: dict[str, float] = {}
    for index, line in enumerate(listing.stdout.splitlines() if listing.returncode == 0 else ()):
        use, used, total = (float(part) for part in line.split(","))
        found |= {f"gpu{index}_percent": use, f"gpu{index}_memory_percent": 100 * used / total}
    return found


def subsets(line: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of a metrics line, by subset."""
    found: dict[str, dict[str, float]] = {}
    for name, value in line.items():
        if name not in NOT_TRACKED and isinstance(value, int | float):
            subset, short = ("validation", name[11:]) if name.startswith("validation_") else ("train", name)
            found.setdefault(subset, {})[short] = value
    return found


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Facts with dotted names and plain values, which every tracker accepts."""
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flat(item, f"{name}.{key}".removeprefix("."))]
    return [(name, value if isinstance(value, int | float | bool | str) else str(value))]

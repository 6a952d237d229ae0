"""The tracker process: follows metrics.jsonl files and copies them to aim and the other trackers of a recipe.

There is one writer per cache, because concurrent writers damage an aim repository. A tracker that fails is a warning, never a
failed run, and the others continue.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from runner.safe_path import PYTHON, safe_environment
from runner.tracking.metrics_file import MetricsReader
from runner.tracking.trackers import Machine, Tracker, TrackerName, open_tracker, resolve_trackers, subsets

CLOSE_SECONDS = 20.0  # to copy what is left when a run ends
POLL_SECONDS = 0.5
EXIT_INCOMPLETE = 1


class TrackerProcess:
    """The run's handle on the tracker process, which starts with the first tracked stage."""

    def __init__(self, cache: Path, to: Sequence[TrackerName] | Literal["auto"] = "auto") -> None:
        self._cache, self._to = cache, resolve_trackers(to)
        self._process: subprocess.Popen[str] | None = None

    def follow(self, metrics: MetricsReader, finished: Path, facts: Mapping[str, Any]) -> None:
        """Copies a metrics file from the offset of `metrics` on. The file moves to `finished` when its stage is done."""
        if not self._to:
            return
        if self._process is None:
            with self._log().open("a") as log:
                command = [*PYTHON, "-m", "runner.tracking.tracker_process", str(self._cache)]
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=safe_environment(dict(os.environ)),
                    cwd=self._cache,  # clients read settings in the current folder: wandb/settings names the server
                    text=True,
                    start_new_session=True,
                )
        places = {"metrics": str(metrics.path), "offset": metrics.offset, "finished": str(finished)}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process died; close() reports it
            self._process.stdin.write(json.dumps({**places, "facts": facts, "to": self._to}) + "\n")
            self._process.stdin.flush()

    def close(self) -> str | None:
        """Waits until everything is copied; returns a warning if that failed."""
        if self._process is None:
            return None
        try:
            self._process.communicate(timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode == 0:
            return None
        return (
            f"warning: not everything reached {', '.join(self._to)} (see {self._log()}); metrics.jsonl has the complete curves"
        )

    def _log(self) -> Path:
        path = self._cache / "logs" / "track.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _TrackedStage:
    """One stage in all its trackers; a tracker that fails is dropped."""

    def __init__(self, cache: Path, message: Mapping[str, Any]) -> None:
        self.complete = True
        self._trackers: dict[TrackerName, Tracker] = {}
        self._paths = [Path(message["metrics"]), Path(message["finished"])]
        self._reader = MetricsReader(self._paths[0], offset=message["offset"])
        self._machine, self._step = Machine(), 0
        for name in message["to"]:
            with self._guarded(name):
                self._trackers[name] = open_tracker(name, cache, message["facts"])

    def copy(self) -> bool:
        """Copies new lines; true once the stage is finished and everything is copied."""
        moved = self._paths[1].exists()
        if moved:
            self._reader.path = self._paths[1]
        for line in self._reader.new_lines():
            self._step = line.get("step", self._step)
            for subset, values in subsets(line).items():
                self._track(values, step=line.get("step"), subset=subset)
        if self._trackers and (seen := self._machine.measure()):
            self._track(seen, step=self._step, subset="system")
        return moved

    def close(self) -> None:
        """Closes all trackers."""
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.close()

    def _track(self, values: Mapping[str, float], *, step: int | None, subset: str) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.track(values, step=step, subset=subset)

    @contextlib.contextmanager
    def _guarded(self, name: TrackerName) -> Iterator[None]:
        try:
            yield
        except Exception:  # a client may raise anything; the others continue
            traceback.print_exc()
            self.complete = False
            self._trackers.pop(name, None)


def main() -> int:
    """Follows the files that standard input names, one JSON object a line, until it closes."""
    cache = Path(sys.argv[1])
    arriving: list[dict[str, Any]] = []
    closed = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            arriving.append(json.loads(line))
        closed.set()

    threading.Thread(target=read, daemon=True).start()
    place = cache / "aim" / "writer.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_stages: list[_TrackedStage] = []
        complete = True
        while True:
            last_round = closed.is_set()
            while arriving:
                open_stages.append(_TrackedStage(cache, arriving.pop(0)))
            for stage in list(open_stages):
                if stage.copy() or last_round:
                    stage.close()
                    open_stages.remove(stage)
                    complete = complete and stage.complete
            if last_round and not arriving:
                return 0 if complete else EXIT_INCOMPLETE
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())

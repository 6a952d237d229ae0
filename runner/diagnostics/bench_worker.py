"""The process that measures for `run bench`: job file in, result file out. It brings the report and the tracker of real runs.

Everything is measured in this one process, so that speeds compare; only peak memory has processes of its own.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.errors import InputError
from runner.artifacts import METRICS
from runner.diagnostics.bench import JOB, LEARNING, LORA, PACE, PROCESSES, RESULT, BenchJob
from runner.execution.worker import EXIT_FAILED, watch_parent
from runner.files import write_whole
from runner.resources import hardware, versions
from runner.tracking.metrics_file import MetricsReader, MetricsWriter
from runner.tracking.tracker_process import TrackerProcess

if TYPE_CHECKING:
    import psutil

QUIET_SECONDS = 1.0  # between two looks at a tracker that starts
QUIET_SHARE = 0.1  # of a core: less than this, it has started
START_SECONDS = 60.0


def main() -> int:
    """Measures what the job in the folder named on the command line asks for."""
    folder = Path(sys.argv[1])
    watch_parent()
    try:
        result = run(BenchJob.read(folder / JOB), folder)
    except InputError as error:  # memory that is too small, say
        _say(f"bench: {error}")
        return EXIT_FAILED
    write_whole(folder / RESULT, json.dumps(result))
    return 0


def run(job: BenchJob, folder: Path) -> dict[str, Any]:
    """The whole result."""
    import torch

    from llm.bench import data_parallel, decode, learning, lora, matmul, memory, overhead, train_step
    from llm.bench.implementations import build_stockpot_model
    from llm.bench.workload import Workload
    from llm.data.token_shards import TokenRows
    from llm.models.interface import count_parameters
    from llm.training.config import Schedule
    from llm.training.distributed.process_group import ProcessGroup

    workload = Workload.model_validate_json(json.dumps(job.workload))
    group = ProcessGroup()
    torch.set_num_threads(workload.cores)
    model = build_stockpot_model(workload)
    device = torch.cuda.get_device_name() if group.device.type == "cuda" else "cpu"
    result: dict[str, Any] = {
        "machine": {"device": device, "threads": workload.cores, "versions": versions(), **hardware()},
        "model": {
            **job.about,
            **job.workload,
            "parameters": count_parameters(model)[1],
            "tokens_per_step": workload.tokens_per_step,
        },
        "seconds": job.seconds,
    }
    if "matmul" in job.only or "train" in job.only:
        _say("matrix products")
        shapes = matmul.shapes(model, tokens=workload.tokens_per_step, device=group.device)
        result["matmul"] = matmul.measure_matmul(shapes, seconds=job.seconds, device=group.device)
    if "train" in job.only:
        _say("training steps" + (", after compiling Transformers" if job.compiled else ""))
        peaks = result["matmul"]
        result["train"] = train_step.measure_train_step(
            workload, peaks, seconds=job.seconds, compiled=job.compiled, group=group
        )
    if "decode" in job.only:
        _say("decoding, after teaching the model to count")
        result["decode"] = decode.measure_decode(workload, model, seconds=job.seconds, compiled=job.compiled, group=group)
    del model
    if "memory" in job.only:
        _say("peak memory")
        result["memory"] = memory.measure_memory(workload)
    if "machinery" in job.only:
        _say("data, tracking and checkpoints")
        rows = TokenRows(Path(job.tokens), seed=0) if job.tokens else overhead.made_up_rows(folder / "tokens", workload)
        with _tracking(folder / "run") as tracking:
            found = overhead.measure_overhead(
                workload,
                rows,
                tracking=tracking,
                checkpoint_every=job.checkpoint_every,
                checkpoint_minutes=job.checkpoint_minutes,
                seconds=job.seconds,
                scratch=folder / "checkpoints",
                group=group,
            )
        about = {"tracker": tracking.name, "rows": "of the recipe" if job.tokens else "made up"}
        result["machinery"] = found | about
    if PACE in job.only:
        result[PACE] = train_step.measure_stockpot_step(workload, seconds=job.seconds, group=group)
    if PROCESSES in job.only:
        _say("steps by one process and by two, after they have started")
        result[PROCESSES] = data_parallel.measure_data_parallel(workload, seconds=job.seconds)
    if LORA in job.only:
        _say("fine-tuning by LoRA and QLoRA beside all weights")
        result[LORA] = lora.measure_lora(workload, seconds=job.seconds, group=group)
    if LEARNING in job.only:
        _say(f"learning, twice for {job.seconds:.0f} s")
        assert job.tokens and job.held_out and job.schedule  # the job of a recipe has them
        text = learning.Text(Path(job.tokens), Path(job.held_out))
        schedule = Schedule.model_validate_json(json.dumps(job.schedule))
        result[LEARNING] = learning.measure_learning(
            workload, text, schedule=schedule, seconds=job.seconds, scratch=folder / "learning", say=_say
        )
    return result


class Untracked:
    """The report of a real run, where no tracker is installed."""

    name = "none installed"

    def __init__(self, metrics: Path) -> None:
        self.report = MetricsWriter(metrics)

    def processor_seconds(self) -> float:
        """Nobody works."""
        return 0.0


class Tracked(Untracked):
    """The report of a real run, with the tracker's process behind it."""

    name = "aim"

    def __init__(self, metrics: Path, process: "psutil.Process") -> None:
        super().__init__(metrics)
        self._process = process

    def processor_seconds(self) -> float:
        """Of the tracker's process, until now."""
        times = self._process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def _tracking(folder: Path) -> Iterator[Untracked]:
    """What follows a training, started and idle."""
    folder.mkdir()
    metrics = folder / METRICS
    if find_spec("aim") is None:
        yield Untracked(metrics)
        return
    import psutil

    tracker, others = TrackerProcess(folder), psutil.Process().children()
    tracker.follow(MetricsReader(metrics), folder / "finished" / METRICS, {"recipe": "bench", "stage": "bench"})
    (process,) = set(psutil.Process().children()) - set(others)
    tracked = Tracked(metrics, process)
    _wait_until_started(tracked, folder)
    try:
        yield tracked
    finally:
        if warning := tracker.close():
            _say(warning)


def _wait_until_started(tracked: Tracked, cache: Path) -> None:
    """Returns when the tracker has opened its run and does little else."""
    deadline, before = time.monotonic() + START_SECONDS, 0.0
    while time.monotonic() < deadline:
        time.sleep(QUIET_SECONDS)
        now = tracked.processor_seconds()
        if now - before < QUIET_SHARE * QUIET_SECONDS and any((cache / "aim").rglob("chunks/*")):
            return
        before = now


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

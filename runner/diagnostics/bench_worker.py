"""The process that measures for `run bench`: job file in, result file out.

Everything is measured in this one process, so that speeds are comparable; only peak memory has processes of its own.
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
from runner.diagnostics.bench import (
    CONTEXT,
    DECODE,
    HEAD,
    JOB,
    LABELS,
    LEARNING,
    LORA,
    PACE,
    PEFT,
    PROCESSES,
    RESULT,
    BenchJob,
)
from runner.execution.worker import EXIT_FAILED, watch_parent
from runner.files import write_whole
from runner.resources import hardware, versions
from runner.tracking.metrics_file import MetricsReader, MetricsWriter
from runner.tracking.tracker_process import TrackerProcess

if TYPE_CHECKING:
    import psutil

    from llm.bench.workload import Workload
    from llm.models.interface import LanguageModel
    from llm.training.distributed.process_group import ProcessGroup

QUIET_SECONDS = 1.0  # between two checks whether the tracker has started
QUIET_SHARE = 0.1  # of a core; a tracker that uses less has started
START_SECONDS = 60.0


def main() -> int:
    """Runs the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    watch_parent()
    try:
        result = run(BenchJob(**json.loads((folder / JOB).read_text(encoding="utf-8"))), folder)
    except InputError as error:  # such as too little memory
        _say(f"bench: {error}")
        return EXIT_FAILED
    write_whole(folder / RESULT, json.dumps(result))
    return 0


def run(job: BenchJob, folder: Path) -> dict[str, Any]:
    """Runs the measurements of the job, in the order of this function."""
    import torch

    from llm.bench import data_parallel, decode_model, head, peft_step, train_step
    from llm.bench.costs import lora, memory
    from llm.bench.implementations import build_stockpot_model
    from llm.bench.workload import Workload
    from llm.training.distributed.process_group import ProcessGroup

    workload = Workload.model_validate_json(json.dumps(job.workload))
    if job.model is not None:
        workload = _with_model(job, workload, folder)
    group = ProcessGroup()
    torch.set_num_threads(workload.cores)
    model = build_stockpot_model(workload)
    result = _what_is_measured(job, workload, model, group) | _model_speeds(job, workload, model, group)
    if DECODE in job.only and workload.folder is not None:
        _say("decoding and prefill beside Transformers and llama.cpp")
        result["decode_model"] = decode_model.measure_decode_model(
            Path(workload.folder), scratch=folder, seconds=job.seconds, compiled=job.compiled, threads=workload.cores
        )
    del model
    if "memory" in job.only:
        _say("peak memory")
        result["memory"] = memory.measure_memory(workload)
    if "machinery" in job.only:
        _say("data, tracking and checkpoints")
        result["machinery"] = _overhead(job, workload, group, folder)
    if PACE in job.only:
        result[PACE] = train_step.measure_stockpot_step(workload, seconds=job.seconds, group=group)
    if PROCESSES in job.only:
        _say("steps by one process and by two, after they have started")
        result[PROCESSES] = data_parallel.measure_data_parallel(workload, seconds=job.seconds)
    if LORA in job.only:
        _say("fine-tuning with LoRA and QLoRA, compared with all weights")
        if workload.folder is None:
            result[LORA] = lora.measure_lora(workload, seconds=job.seconds, group=group)
        if workload.adapter is not None:
            result[PEFT] = peft_step.measure_peft(workload, seconds=job.seconds, group=group)
    if HEAD in job.only:
        _say("heads of large vocabularies")
        result[HEAD] = head.measure_head(workload.architecture.hidden_size, seconds=job.seconds, device=group.device)
    if CONTEXT in job.only:
        _say("peak memory of rows of 512 to 16,384 positions")
        result[CONTEXT] = memory.measure_contexts(workload)
    if LEARNING in job.only:
        _say(f"learning, twice for {job.seconds:.0f} s")
        result[LEARNING] = _learning(job, workload, folder)
    return result


def _what_is_measured(job: BenchJob, workload: "Workload", model: "LanguageModel", group: "ProcessGroup") -> dict[str, Any]:
    """The machine, the model and the time of each measurement."""
    import torch

    from llm.models.interface import count_parameters

    device = torch.cuda.get_device_name() if group.device.type == "cuda" else "cpu"
    parameters = {"parameters": count_parameters(model)[1], "tokens_per_step": workload.tokens_per_step}
    return {
        "machine": {"device": device, "threads": workload.cores, "versions": versions(), **hardware()},
        "model": {**job.about, **job.workload, **parameters},
        "seconds": job.seconds,
    }


def _with_model(job: BenchJob, workload: "Workload", folder: Path) -> "Workload":
    """The workload with the weights of the folder that the user named, and with rows of the recipe's chats if it has some."""
    from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
    from runner.diagnostics.bench_rows import packed_rows

    base, rows = folder / "base", None
    import_checkpoint(inspect_checkpoint(Path(str(job.model))), base)
    if job.fields is not None:
        rows = packed_rows(job.kind, job.fields, base, folder / "packed", say=_say)
    found = {"folder": str(base), "rows_folder": None if rows is None else str(rows)}
    return workload.model_copy(update=found)


def _model_speeds(job: BenchJob, workload: "Workload", model: "LanguageModel", group: "ProcessGroup") -> dict[str, Any]:
    """Matrix products, training steps, decoding and classification of one model."""
    from llm.bench import decode, labels, matmul, train_step

    found: dict[str, Any] = {}
    if "matmul" in job.only or "train" in job.only:
        _say("matrix products")
        shapes = matmul.shapes(model, tokens=workload.tokens_per_step, device=group.device)
        found["matmul"] = matmul.measure_matmul(shapes, seconds=job.seconds, device=group.device)
    if "train" in job.only:
        _say("training steps" + (", after compiling Transformers" if job.compiled else ""))
        found["train"] = train_step.measure_train_step(
            workload, found["matmul"], seconds=job.seconds, compiled=job.compiled, group=group
        )
    if DECODE in job.only and workload.folder is None:
        _say("decoding, after teaching the model to count")
        found["decode"] = decode.measure_decode(workload, model, seconds=job.seconds, compiled=job.compiled, group=group)
    if LABELS in job.only:
        _say("labels after a shared prompt")
        found[LABELS] = labels.measure_labels(workload, model, seconds=job.seconds, device=group.device)
    return found


def _overhead(job: BenchJob, workload: "Workload", group: "ProcessGroup", folder: Path) -> dict[str, Any]:
    """What data, tracking and checkpoints add to a step."""
    from llm.bench.costs import overhead
    from llm.data.token_rows import TokenRows

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
    return {**found, "tracker": tracking.name, "rows": "of the recipe" if job.tokens else "made up"}


def _learning(job: BenchJob, workload: "Workload", folder: Path) -> dict[str, Any]:
    """Held-out loss of two trainings after the same time."""
    from llm.bench import learning
    from llm.training.config import Schedule

    assert job.tokens and job.held_out and job.schedule  # a job of a recipe has them
    text = learning.Text(Path(job.tokens), Path(job.held_out))
    schedule = Schedule.model_validate_json(json.dumps(job.schedule))
    return learning.measure_learning(
        workload, text, schedule=schedule, seconds=job.seconds, scratch=folder / "learning", say=_say
    )


class Tracked:
    """The metrics file of a real run, followed by the tracker's process if there is one."""

    def __init__(self, metrics: Path, process: "psutil.Process | None" = None) -> None:
        self.name = "aim" if process else "none installed"
        self.report = MetricsWriter(metrics)
        self._process = process

    def processor_seconds(self) -> float:
        """Of the tracker's process, so far."""
        if self._process is None:
            return 0.0
        times = self._process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def _tracking(folder: Path) -> Iterator[Tracked]:
    """The tracking of a training, started and idle."""
    folder.mkdir()
    metrics = folder / METRICS
    if find_spec("aim") is None:
        yield Tracked(metrics)
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
    """Returns when the tracker has opened its run and is idle."""
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

"""How fast this machine trains: measured once by some steps of a small model, and remembered for the user."""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from llm.bench.workload import Workload
from runner.compiled_code import compiled_folder
from runner.diagnostics.bench import PACE, PACE_SECONDS, BenchJob, measure
from runner.errors import StageError
from runner.files import write_whole
from runner.recipe.training_work import training_work
from runner.resources import available_cores, gpu_count

FOLDER = "speeds"  # beside compiled code: a file per machine
SIZES = {"hidden_size": 192, "layers": 4, "heads": 6, "context": 256}  # 2.6M parameters
VOCABULARY, ROW, ROWS = 4096, 256, 8
BUSY = 0.5  # processes per core that want to run, in the last minute, from which on a measurement is not remembered


def machine_speed(*, say: Callable[[str], None] | None = None) -> float | None:
    """The work of trainings (`runner.recipe.training_work`) per second. If it was never measured, it is measured now (10 s),
    and `say` is told; without `say`, or if measuring fails, None.
    """
    path = _path()
    if path is not None:
        with contextlib.suppress(OSError, ValueError):
            return float(json.loads(path.read_text(encoding="utf-8")))
    if say is None:
        return None
    busy = os.getloadavg()[0] > BUSY * available_cores()
    once = "as it is now, busy with other work" if busy else "once"
    say(f"measuring how fast this machine trains (10 s, {once})")
    try:
        found = _measured()
    except StageError:
        return None
    if path is not None and not busy:
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            write_whole(path, json.dumps(found))
    return found


def _measured() -> float:
    step = {"vocab_size": VOCABULARY, "context": ROW, "rows": ROWS, "compiled": False, "fused_attention": False}
    workload = Workload.model_validate({"architecture": SIZES, **step, "cores": available_cores()})
    job = BenchJob(workload.model_dump(mode="json"), {"recipe": None, "stage": None}, None, PACE_SECONDS, False, [PACE])
    pace = measure(job)[PACE]
    seconds = ROW * ROWS / float(pace["tokens_per_second"])  # of a step
    work = training_work(float(pace["flops_per_second"]) * seconds, ROW * ROWS, steps=1, gpu=bool(gpu_count()))
    return work / seconds


def _path() -> Path | None:
    try:
        folder = compiled_folder()
    except StageError:
        return None
    facts = f"{version('torch')} {platform.node()} {available_cores()} cores {gpu_count()} GPUs"
    return folder / FOLDER / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"

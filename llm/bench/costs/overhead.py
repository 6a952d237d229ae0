"""What everything around the steps costs a training: data, tracking and checkpoints, as shares of the time of a bare step.

A bare step (`Loop.step` on batches that are ready) and a full one (batches from `llm.training.loader` over real rows, losses
through the real report with a tracker behind it, as in `llm.training.trainer.train`) take turns. A cost is the time that the
loop waits, plus the processor time that the background takes from the cores of the step, as the operating system counts it:

    data         wait for the next batches + processor time of making them
    tracking     time of reporting + processor time of the tracker's process, all of it charged to the full steps
    checkpoints  copying the state + processor time of writing it, once per interval of the recipe (five minutes by default)

These are upper bounds: where a core is idle, background work costs nothing. They hardly depend on noise, unlike the difference
between full and bare steps, which is given as a check (a tracker runs during both, so it hardly shows there). What is done
once, such as starting the tracker, is in no share. On a GPU the bound counts processor cores as if they computed.
"""

import math
import statistics
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm.bench.implementations import MANY, StockpotTraining, build_stockpot_model
from llm.bench.timing import LEAST_ROUNDS
from llm.bench.workload import Workload
from llm.data.batch import Batch, RowSource
from llm.data.token_rows import TokenRows
from llm.data.token_shards import TokenWriter
from llm.device import synchronize
from llm.training import checkpoint
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import feed
from llm.training.step import LOG_EVERY

SAVES = 3
MADE_UP_TOKENS = 2**21
MEAN_DOCUMENT = 400  # tokens


class Tracking(Protocol):
    """What observes a training from outside."""

    def report(self, **values: Any) -> None:
        """Take one line of metrics."""

    def processor_seconds(self) -> float:
        """Processor time of the tracker's process until now."""


@dataclass
class Spent:
    """Seconds of full and bare steps, and of what the full ones waited for."""

    full: list[float]
    bare: list[float]
    feeding: float = 0.0
    reporting: float = 0.0
    tracker: float = 0.0  # of processor


def measure_overhead(
    workload: Workload,
    rows: RowSource,
    *,
    tracking: Tracking,
    checkpoint_every: int | None,
    checkpoint_minutes: float | None,
    seconds: float,
    scratch: Path,
    group: ProcessGroup,
) -> dict[str, Any]:
    """Shares of step time, and the seconds that they come from."""
    ours = StockpotTraining(workload, build_stockpot_model(workload), group=group, rows=rows, report=tracking.report)
    threads = ours.runtime.threads
    loading = _loading(ours, seconds=seconds)
    spent = _turns(ours, tracking, seconds=seconds)
    copying, writing = _checkpoints(ours, scratch)

    steps, bare = len(spent.full), statistics.median(spent.bare)
    costs = {
        "data": (spent.feeding / steps + loading / threads) / bare,
        "tracking": (spent.reporting + spent.tracker / threads) / steps / bare,
        "checkpoints": (copying + writing / threads)
        / interval_seconds(bare, every=checkpoint_every, minutes=checkpoint_minutes),
    }
    return {
        **costs,
        "total": sum(costs.values()),
        "difference": statistics.fmean(spent.full) / statistics.fmean(spent.bare) - 1,
        "steps": steps,
        "threads": threads,
        "seconds": {
            "bare_step": bare,
            "waiting_for_batches": spent.feeding / steps,
            "loading_batches": loading,
            "reporting": spent.reporting / steps,
            "tracker": spent.tracker / steps,
            "copying_state": copying,
            "writing_state": writing,
        },
    }


def interval_seconds(step: float, *, every: int | None, minutes: float | None) -> float:
    """Seconds between two checkpoints of a training with such steps; infinite where there are none."""
    return min(every * step if every is not None else math.inf, 60 * minutes if minutes is not None else math.inf)


def made_up_rows(folder: Path, workload: Workload) -> TokenRows:
    """Rows of random documents, in the format on disk that trainings read."""
    random = np.random.default_rng(0)
    lengths = random.geometric(1 / MEAN_DOCUMENT, size=MADE_UP_TOKENS // MEAN_DOCUMENT) + 1
    with TokenWriter(folder, vocab_size=workload.vocab_size, context=workload.context, padding=0) as writer:
        for length in lengths.tolist():
            writer.append(random.integers(workload.vocab_size, size=length).tolist(), passes=1, text_bytes=length)
        writer.finish()
    return TokenRows(folder, seed=0)


def _batches(ours: StockpotTraining) -> Generator[tuple[list[Batch], float], None, None]:
    yield from feed(ours.task.rows, ours.group, ours.runtime.micro_batch, ours.workload.rows, range(MANY))


def _loading(ours: StockpotTraining, *, seconds: float) -> float:
    """Processor seconds of making the batches of one step, while nothing else runs."""
    loaded = _batches(ours)
    next(loaded)  # the first opens files and draws the order
    began, busy, steps = time.perf_counter(), time.process_time(), 0
    while steps < LEAST_ROUNDS or time.perf_counter() - began < seconds / 10:
        next(loaded)
        steps += 1
    loaded.close()
    return (time.process_time() - busy) / (steps + 1)  # one more was made ahead


def _turns(ours: StockpotTraining, tracking: Tracking, *, seconds: float) -> Spent:
    """Full and bare steps in turns; at least as many as there are between two reports."""
    device, spent = ours.group.device, Spent([], [])
    loaded = _batches(ours)
    next(loaded)
    for _ in range(2):
        ours.step()
    ours.progress.step = 0
    synchronize(device)
    busy, began = tracking.processor_seconds(), time.perf_counter()
    while len(spent.full) < LOG_EVERY or time.perf_counter() - began < 2 * seconds:
        for full in (True, False) if len(spent.full) % 2 else (False, True):
            if full:
                _full_step(ours, loaded, spent)
            else:
                start = time.perf_counter()
                parts, targets = ours.prepared[len(spent.bare) % len(ours.prepared)]
                ours.loop.step(ours.progress, parts, targets=targets, rounds=ours.rounds)
                synchronize(device)
                spent.bare.append(time.perf_counter() - start)
    spent.tracker = tracking.processor_seconds() - busy
    loaded.close()
    return spent


def _full_step(ours: StockpotTraining, loaded: Iterator[tuple[list[Batch], float]], spent: Spent) -> None:
    """One step as the training loop takes it."""
    start = time.perf_counter()
    parts, targets = next(loaded)
    fed = time.perf_counter()
    ours.loop.step(ours.progress, parts, targets=targets, rounds=ours.rounds)
    ours.progress.step += 1
    synchronize(ours.group.device)
    stepped = time.perf_counter()
    if ours.progress.step % LOG_EVERY == 0:
        ours.loop.report_steps(ours.progress)
    ended = time.perf_counter()
    spent.full.append(ended - start)
    spent.feeding += fed - start
    spent.reporting += ended - stepped


def _checkpoints(ours: StockpotTraining, scratch: Path) -> tuple[float, float]:
    """Seconds that the loop waits while the state is copied, and processor seconds of writing it; medians."""
    copying, writing = [], []
    with checkpoint.Writer(scratch, kept=2) as writer:
        for save in range(SAVES):
            start = time.perf_counter()
            state = checkpoint.take(ours.model, ours.loop.optimizers, facts={"step": save})
            copying.append(time.perf_counter() - start)
            busy = time.process_time()
            writer.submit(state)
            writer.wait()
            writing.append(time.process_time() - busy)
    return statistics.median(copying), statistics.median(writing)

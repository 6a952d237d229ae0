"""Batches for the training loop, made in the background while the step before them is computed.

A row from a disk that has not been read takes 20 to 40 ms, nearly all of it waiting: so the rows of a step are read by several
threads at once. Their order is that of their indices, whichever comes first.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from llm.data.batch import Batch, RowSource, collate
from llm.training.distributed.process_group import ProcessGroup

READERS = 8  # threads; more do not help a disk, and one row has several places to read


def feed(
    rows: RowSource,
    group: ProcessGroup,
    micro_batch: int,
    rows_per_step: int,
    steps: range,
    place: Callable[[int], int] = lambda step: step,  # the step whose rows a step learns from
) -> Generator[tuple[list[Batch], float], None, None]:
    """This process's micro-batches of each step, and how many targets they have, by their weights."""
    mine = range(group.rank, rows_per_step, group.size)
    readers = _readers()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:

        def load(step: int) -> tuple[list[Batch], float]:
            first = place(step) * rows_per_step
            found = list(readers.map(rows.row, [first + index for index in mine]))
            parts, targets = [], 0.0
            for start in range(0, len(mine), micro_batch):
                batch = collate(found[start : start + micro_batch], mine[start : start + micro_batch])
                targets += batch.loss_count
                parts.append(batch.to(group.device))
            return parts, targets

        ahead = pool.submit(load, steps.start)
        for step in steps:
            loaded = ahead.result()
            if step + 1 < steps.stop:
                ahead = pool.submit(load, step + 1)
            yield loaded


@cache
def _readers() -> ThreadPoolExecutor:
    """The threads of this process that read rows, all of them started: a thread that starts when memory is short may die
    before it says that it runs, and its starter would wait for ever.
    """
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="rows")
    together = threading.Barrier(READERS)
    list(pool.map(lambda _: together.wait(), range(READERS)))
    return pool


def most_batches(count: int, group: ProcessGroup, micro_batch: int) -> int:
    """Batches of the process that gets the most of `count` rows."""
    return -(-len(range(0, count, group.size)) // micro_batch)


def batches(rows: RowSource, indices: Sequence[int], micro_batch: int, *, first: int = 0) -> Iterator[Batch]:
    """Rows `first` + each of `indices`, `micro_batch` at a time."""
    for start in range(0, len(indices), micro_batch):
        chosen = indices[start : start + micro_batch]
        yield collate([rows.row(first + index) for index in chosen], chosen)

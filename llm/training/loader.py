"""Batches for the training loop, made in the background while the step before them is computed."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

from llm.data.batch import Batch, RowSource, collate
from llm.training.distributed.process_group import ProcessGroup


def feed(
    rows: RowSource,
    group: ProcessGroup,
    micro_batch: int,
    rows_per_step: int,
    steps: range,
    place: Callable[[int], int] = lambda step: step,  # the step whose rows a step learns from
) -> Generator[tuple[list[Batch], int], None, None]:
    """This process's micro-batches of each step, and how many targets they have."""
    mine = range(group.rank, rows_per_step, group.size)

    def load(step: int) -> tuple[list[Batch], int]:
        parts, targets = [], 0
        for batch in batches(rows, mine, micro_batch, first=place(step) * rows_per_step):
            targets += batch.loss_count
            parts.append(batch.to(group.device))
        return parts, targets

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows") as pool:
        ahead = pool.submit(load, steps.start)
        for step in steps:
            loaded = ahead.result()
            if step + 1 < steps.stop:
                ahead = pool.submit(load, step + 1)
            yield loaded


def most_batches(count: int, group: ProcessGroup, micro_batch: int) -> int:
    """Batches of the process that gets the most of `count` rows."""
    return -(-len(range(0, count, group.size)) // micro_batch)


def batches(rows: RowSource, indices: range, micro_batch: int, *, first: int = 0) -> Iterator[Batch]:
    """Rows `first` + each of `indices`, `micro_batch` at a time."""
    for start in range(0, len(indices), micro_batch):
        chosen = indices[start : start + micro_batch]
        yield collate([rows.row(first + index) for index in chosen], chosen)

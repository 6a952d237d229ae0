"""Work on many rows in batches: rows of similar length together, as many as memory holds, shared by all processes.

The batches are made of all rows before they are shared, so the number of processes changes no batch, and no result.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from llm.device import free_memory, is_out_of_memory, main_device, release_cached_memory
from llm.inference.processes import Processes
from llm.inference.timer import GenerationTimer

T = TypeVar("T")
SHARE = 0.5  # of the free memory that a batch may take; the rest is for what is not foreseen, such as other programs

OnProgress = Callable[[int, int], None]  # rows done, rows in all; may raise to stop


@dataclass(frozen=True)
class Limits:
    """How large a batch may be; one row is always a batch."""

    tokens: int | None = None  # positions, padding included
    rows: int | None = None
    memory: float = float("inf")  # bytes
    bytes_per_token: float = 0.0
    bytes_per_row: float = 0.0

    def rows_of(self, longest: int) -> int:
        """How many rows of at most `longest` positions fit."""
        fits = [float(self.rows or float("inf")), (self.tokens or float("inf")) // max(1, longest)]
        if each := longest * self.bytes_per_token + self.bytes_per_row:
            fits.append(self.memory // each)
        return int(max(1, min(fits)))


def memory_for_batch(device: torch.device, processes: Processes) -> float:
    """Bytes that a batch may take in each process: the least of all, since all make the same batches."""
    own = SHARE * free_memory(device)
    return min(processes.exchange(own / processes.local if device.type == "cpu" else own))


def similar_lengths(lengths: Mapping[int, int], limits: Limits) -> Iterator[list[int]]:
    """The keys of `lengths` in batches of similar length, as large as `limits` allow; the longest first."""
    order = sorted(lengths, key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = limits.rows_of(lengths[order[start]])
        yield order[start : start + size]
        start += size


def work_in_batches(
    batches: Sequence[list[int]],
    work: Callable[[list[int], GenerationTimer], Sequence[T]],
    *,
    processes: Processes,
    timer: GenerationTimer,
    release: Callable[[], None] = lambda: None,
    progress: OnProgress = lambda done, total: None,
) -> dict[int, T]:
    """The result of `work` for each index of the batches, the same in every process; results are values of JSON.

    Each round, every process works on one batch. A batch that is out of memory, after `release`, is halved until it fits;
    later ones are cut to the size that did. An error in one process, also of `progress`, ends all of them with its message.
    """
    results: dict[int, T] = {}
    total = sum(map(len, batches))
    halving = _Halving[T](work, release)
    for first in range(0, len(batches), processes.size):
        together = batches[first : first + processes.size]
        error: Exception | None = None
        found, spent = list[T](), GenerationTimer()
        try:
            if processes.rank < len(together):
                found = halving.results(together[processes.rank], spent)
            progress(len(results) + sum(map(len, together)), total)
        except Exception as caught:
            error = caught
        parts = processes.agreed((found, vars(spent)), error)
        timer.add([GenerationTimer(**part[1]) for part in parts])
        for batch, (values, _) in zip(together, parts, strict=False):
            results |= zip(batch, values, strict=True)
    return results


class _Halving(Generic[T]):
    """Does a batch in parts as small as memory needs."""

    def __init__(self, work: Callable[[list[int], GenerationTimer], Sequence[T]], release: Callable[[], None]) -> None:
        self._work, self._release = work, release
        self._most: int | None = None  # rows; of the batch that was halved last

    def results(self, batch: list[int], timer: GenerationTimer) -> list[T]:
        size = min(len(batch), self._most or len(batch))
        found: list[T] = []
        while len(found) < len(batch):
            part = batch[len(found) : len(found) + size]
            spent = GenerationTimer()
            try:
                found += self._work(part, spent)
            except Exception as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            else:
                timer.add([spent])
                continue
            # Outside of `except`: the error's frames hold what took the memory.
            self._most = size = len(part) // 2
            self._release()
            gc.collect()
            release_cached_memory(main_device())
        return found

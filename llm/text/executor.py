"""Executors run a function over shards with one method, `map`: here, in processes of this machine.

A cluster engine can replace them with the same method: the functions are pure and picklable, and write their results to the
file system.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

S = TypeVar("S")
R = TypeVar("R")


class Executor(Protocol):
    """Maps a picklable function over shards."""

    def map(self, function: Callable[[S], R], shards: Iterable[S]) -> Iterator[R]:
        """Results in the order of the shards, which are read as needed: memory does not grow with their number."""


class LocalProcesses:
    """Processes of this machine, one per core; with one core or one shard, only this process."""

    def __init__(self, cores: int) -> None:
        self.cores = cores

    def map(self, function: Callable[[S], R], shards: Iterable[S]) -> Iterator[R]:
        """Results in the order of the shards; at most two shards per process are in flight."""
        shards = iter(shards)
        first = list(islice(shards, 2))
        if self.cores == 1 or len(first) == 1:  # starting a process takes longer than a small shard
            yield from map(function, chain(first, shards))
            return
        # Spawned, not forked: the caller may have threads.
        # A process gets the function once: it may have a large argument, such as a tokenizer.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.cores, context, initializer=_enter, initargs=(function,))
        in_flight: deque[Future[R]] = deque()
        try:
            for shard in chain(first, shards):
                in_flight.append(pool.submit(_work, shard))
                if len(in_flight) > 2 * self.cores:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that prepares text was killed, most likely because memory ran out; what is finished is kept: set "
                "STOCKPOT_CORES to fewer cores and run again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_functions: list[Callable[[Any], Any]] = []  # of a new process: what it does with a shard


def _enter(function: Callable[[Any], Any]) -> None:
    """Set up a new process: leave Ctrl-C to its parent, use one thread, and exit when the parent exits."""
    _functions.append(function)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"  # else rensa and tokenizers start a thread per core in each process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(shard: Any) -> Any:
    return _functions[-1](shard)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""Who does the work on shards: an executor has one method, `map`. Here that is processes of this machine.

A cluster's engine takes their place by offering the same method: functions are pure and picklable, and leave what they
make on the file system.
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
from typing import Protocol, TypeVar

S = TypeVar("S")
R = TypeVar("R")


class Executor(Protocol):
    """Maps a picklable function over shards."""

    def map(self, function: Callable[[S], R], shards: Iterable[S]) -> Iterator[R]:
        """Results in the order of the shards, which are drawn as they are needed: memory does not grow with their number."""
        ...


class LocalProcesses:
    """Processes of this machine, one per core; with one core or one shard, this process alone."""

    def __init__(self, cores: int) -> None:
        self.cores = cores

    def map(self, function: Callable[[S], R], shards: Iterable[S]) -> Iterator[R]:
        """Results in the order of the shards; at most two shards per process are in flight."""
        shards = iter(shards)
        first = list(islice(shards, 2))
        if self.cores == 1 or len(first) == 1:  # nothing to share: processes take longer to start than a small shard does
            yield from map(function, chain(first, shards))
            return
        # Spawned, not forked: whoever calls may have threads.
        pool = ProcessPoolExecutor(self.cores, multiprocessing.get_context("spawn"), initializer=_enter)
        in_flight: deque[Future[R]] = deque()
        try:
            for shard in chain(first, shards):
                in_flight.append(pool.submit(function, shard))
                if len(in_flight) > 2 * self.cores:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process working on the corpus was killed, most likely for want of memory; what it had finished is kept, "
                "and the next run goes on from there"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _enter() -> None:
    """What a new process does first: leave Ctrl-C to its parent, use one thread, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"  # rensa would start a thread per core in each process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""What happens to a group of processes when one of them fails while the others wait for it: all of them end, within seconds.

Nothing leaves a collective that waits for a process: gloo notices that a process has ended, and NCCL not even that on every
network. So a process that fails leaves a note in the store by which the group was formed, and a thread of each of the others
looks there. A process that does not find out by itself is ended by its thread.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from torch.distributed import Store  # type: ignore[attr-defined]  # torch does not list it

from llm.errors import InputError, Interrupted, MemoryShortageError, Paused
from llm.training.distributed.process_group import ProcessGroup

LOOKS_EVERY = 1.0  # seconds
GRACE = 3.0  # seconds in which a process may end by itself: gloo takes milliseconds
NOTE = "failure"  # the key in the store


@dataclass(frozen=True)
class Failure:
    """Why a process failed, as the others get to know it."""

    rank: int
    text: str
    kind: Literal["memory", "input", "other"]
    micro_batch: int = 0  # rows that may fit, where memory ran out

    @classmethod
    def of(cls, error: Exception, *, rank: int, size: int) -> "Failure":
        """What `error` means for the others."""
        match error:
            case MemoryShortageError(micro_batch=micro_batch):
                return cls(rank, str(error), "memory", micro_batch)
            case InputError():
                return cls(rank, str(error), "input")
        return cls(rank, f"process {rank} of {size} failed: {type(error).__name__}: {error}", "other")

    def error(self) -> Exception:
        """The error that ends the other processes."""
        match self.kind:
            case "memory":
                return MemoryShortageError(self.text, micro_batch=self.micro_batch)
            case "input":
                return InputError(self.text)
        return RuntimeError(self.text)


@contextlib.contextmanager
def failing_together(
    group: ProcessGroup, *, limit_memory: Callable[[int], None], before_end: Callable[[], None]
) -> Iterator[None]:
    """Within, an error in one process ends all of them with the same error.

    `limit_memory` is called with the rows that may fit, in every process, where memory ran out in one; `before_end` before a
    process that waits is ended. Interrupted and Paused are no failures: all processes raise them alike.
    """
    store = group.store
    if store is None:
        try:
            yield
        except MemoryShortageError as error:
            limit_memory(error.micro_batch)
            raise
        return
    left = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, left, limit_memory, before_end), name="failures", daemon=True)
    thread.start()
    try:
        yield
        group.wait()  # the process that keeps the store is not the first to leave
    except (Interrupted, Paused):
        raise
    except Exception as error:
        left.set()
        failure = _first(store, Failure.of(error, rank=group.rank, size=group.size))
        if failure.kind == "memory":
            limit_memory(failure.micro_batch)
        if failure.rank == group.rank or isinstance(error, InputError):
            raise
        raise failure.error() from error
    finally:
        left.set()
        thread.join()


def _first(store: Store, own: Failure) -> Failure:
    """The failure that was noted first; `own` where none was, which is noted then."""
    try:
        return _read(store.compare_set(NOTE, "", json.dumps(asdict(own))))
    except RuntimeError:  # the process that kept the store has ended
        return own


def _read(note: bytes) -> Failure:
    return Failure(**json.loads(note))


def _watch(store: Store, left: threading.Event, limit_memory: Callable[[int], None], before_end: Callable[[], None]) -> None:
    while not left.wait(LOOKS_EVERY):
        text = "the process that keeps the store of the group has ended"
        with contextlib.suppress(RuntimeError):
            if not store.check([NOTE]):
                continue
            failure = _read(store.get(NOTE))
            text = failure.text
            if failure.kind == "memory":
                limit_memory(failure.micro_batch)
        if not left.wait(GRACE):
            with contextlib.suppress(Exception):
                before_end()
            print(f"ends, since {text}", file=sys.stderr, flush=True)
            os._exit(1)

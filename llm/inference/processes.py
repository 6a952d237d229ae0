"""The processes that share the work of one evaluation, started by `accelerate launch`; or this process alone.

They exchange small Python values between main memories, over gloo, and each works on a part of the rows.
"""

import atexit
import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from llm.device import main_device
from llm.errors import InputError, Interrupted

T = TypeVar("T")
# A process waits while another scores what only one can (lm-eval), however long that is. If one dies, the launcher ends all.
TIMEOUT = timedelta(days=30)
KINDS: dict[str, type[Exception]] = {"InputError": InputError, "Interrupted": Interrupted}  # which all processes raise alike


class Processes:
    """This process among those of its group."""

    def __init__(self, *, size: int = 1, rank: int = 0, local: int = 1) -> None:
        self.size, self.rank = size, rank
        self.local = local  # processes of the group on this machine

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """The value of each process, by rank; every process calls this equally often.

        Values are those that JSON can hold: torch's own functions for objects would unpickle what the others send.
        """
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        sent = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        sent[: len(own)] = own
        found = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(found, sent)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(found, sizes, strict=True)]

    def by_main(self, work: Callable[[], T]) -> T:
        """What `work` returns in the main process, the only one that does it; the others wait. Its error ends all."""
        error: Exception | None = None
        value: T | None = None
        if self.is_main:
            try:
                value = work()
            except Exception as caught:
                error = caught
        return self.agreed(value, error)[0]

    def agreed(self, value: T | None, error: Exception | None) -> list[T]:
        """`exchange`, unless a process passes an error instead of a value: then all of them raise it."""
        found = self.exchange((value, None if error is None else _told(error)))
        if error is not None:
            raise error
        for rank, (_, told) in enumerate(found):
            if told is not None:
                kind, message = told
                raise KINDS[kind](message) if kind in KINDS else RuntimeError(f"process {rank}: {kind}: {message}")
        return [value for value, _ in found]  # type: ignore[misc]  # without an error, each has passed a value


def _told(error: Exception) -> tuple[str, str]:
    """The kind and the message of an error, for the other processes."""
    kind = next((name for name, known in KINDS.items() if isinstance(error, known)), type(error).__name__)
    return kind, str(error)


def _leave() -> None:
    """Leave the group while Python still runs: gloo's threads would abort a process that ends around them."""
    if dist.is_initialized():
        dist.destroy_process_group()


ALONE = Processes()


def join() -> tuple[Processes, torch.device]:
    """Join the group that the environment describes; the processes, and the device of this one."""
    size, rank, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (
            ("WORLD_SIZE", "1"),
            ("RANK", "0"),
            ("LOCAL_RANK", "0"),
        )
    )
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=TIMEOUT)
        atexit.register(_leave)
    device = main_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Processes(size=size, rank=rank, local=int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), device

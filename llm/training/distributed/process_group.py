"""The processes of one training: which is the main one, what they add up, and the wrapper that sums their gradients.

Counts and flags go over a gloo group of their own, between main memories, so they never wait for a GPU.
"""

import contextlib
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch does not list them
from torch.nn.parallel import DistributedDataParallel

from llm.device import main_device
from llm.errors import InputError, Interrupted
from llm.training.distributed.fsdp import Strategy, is_sharded
from llm.training.loss import Learner


class ProcessGroup:
    """This process and the others that `accelerate launch` started with it; or this process alone."""

    def __init__(self, *, find_unused_parameters: bool = False, timeout_minutes: float = 30.0) -> None:
        """Join the group; each process waits `timeout_minutes` for the others, here and whenever they compute together."""
        timeout = timedelta(minutes=timeout_minutes)
        # The loop splits rows and normalizes the loss itself: DDP only has to average gradients.
        options = DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=find_unused_parameters
        )
        handlers = [options, InitProcessGroupKwargs(timeout=timeout)]
        self._accelerator = Accelerator(cpu=main_device().type == "cpu", mixed_precision="no", kwargs_handlers=handlers)
        self.size: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        found = self._accelerator.device
        self.device = torch.device("cpu") if found.type == "cpu" else found  # what is on "cpu" would be copied to "cpu:0"
        self._host = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None
        options.find_unused_parameters = self.find_unused_parameters = bool(self.from_main(find_unused_parameters))
        expected = self.from_main(self.device.type)
        if self.sum(self.device.type != expected)[0]:
            raise InputError(
                f"processes: expected the kind of device of process 0, {expected}, in all {self.size} of them; "
                f"got {self.device.type} in process {self.rank}"
            )

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @property
    def store(self) -> Store | None:
        """What all processes read and write without waiting for each other, of this group alone; None without others."""
        if self._host is None:
            return None
        return PrefixStore(self._host.group_name, dist.distributed_c10d._get_default_store())

    def wrap(self, learner: Learner, strategy: Strategy) -> nn.Module:
        """`learner`, as `llm.training.distributed.fsdp.shard` returns it, such that a backward pass averages gradients.

        RuntimeError if that does not follow `strategy`: no other strategy is ever used in its place.
        """
        # Weights that do not learn are the same everywhere: DDP would copy those of the main process over them, and pages of a
        # file that processes share would become copies.
        frozen = [name for name, weight in learner.named_parameters() if not weight.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(learner, frozen)  # type: ignore[no-untyped-call]
        wrapped: nn.Module = learner if strategy == "fsdp" else self._accelerator.prepare(learner, device_placement=[False])
        found = "fsdp" if is_sharded(wrapped) else "ddp" if isinstance(wrapped, DistributedDataParallel) else "single"
        if found != strategy or (found == "single") != (self.size == 1):
            raise RuntimeError(f"strategy of {self.size} processes: expected {strategy!r}, got {found!r}")
        return wrapped

    @contextlib.contextmanager
    def gradient_sync(self, wrapped: nn.Module, enabled: bool) -> Iterator[None]:
        """Whether backward passes inside average gradients; if not, they add up in each process alone.

        Under "fsdp" they always do: each process would hold the gradients of all weights until they are averaged.
        """
        if isinstance(wrapped, DistributedDataParallel) and not enabled:
            with wrapped.no_sync():
                yield
        else:
            yield

    def sum(self, *values: float) -> list[float]:
        """Each value added up over the group, in fp64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def min(self, *values: float) -> list[float]:
        """The smallest of each value over the group."""
        return self._reduce(values, dist.ReduceOp.MIN)

    def max(self, *values: float) -> list[float]:
        """The largest of each value over the group."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self._host is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self._host)
        return tensor.tolist()

    def wait(self) -> None:
        """Return once all processes have called this."""
        self.sum(0)

    def any_full(self, full: bool, *, stopping: bool) -> bool:
        """Whether memory is `full` in one of the processes; Interrupted in all where one is asked to stop.

        All of them call this equally often.
        """
        asked, found = self.sum(stopping, full)
        if asked:
            raise Interrupted("asked to stop")
        return found > 0

    def from_main(self, value: Any) -> Any:
        """What the main process passed, which JSON can hold: torch's own functions for objects would unpickle it."""
        return value if self._host is None else json.loads(self.bytes_from_main(json.dumps(value).encode()))

    def bytes_from_main(self, content: bytes) -> bytes:
        """The bytes that the main process passed."""
        if self._host is None:
            return content
        (size,) = self.sum(len(content) if self.is_main else 0)
        if not size:
            return b""
        sent = (
            torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if self.is_main
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(sent, src=0, group=self._host)
        return sent.numpy().tobytes()

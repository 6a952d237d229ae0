"""The processes of one training: who is first, what they add up, and the wrapping that sums their gradients.

Counts and flags go over a gloo group of their own, between main memories, so asking them never waits for a GPU.
"""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from llm.errors import Interrupted


class Group:
    """This process and the others that `accelerate launch` started with it; or this process alone."""

    def __init__(self) -> None:
        # Rows are split and the loss is normalized by the loop itself: DDP only has to average gradients.
        options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[options])
        self.size: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        self.device: torch.device = self._accelerator.device
        self._host = dist.new_group(backend="gloo") if self.size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` on this process's device, with gradients averaged over the group after each backward pass."""
        wrapped: nn.Module = self._accelerator.prepare(module)
        return wrapped

    def sum(self, *values: float) -> list[float]:
        """Each value added up over the group, in fp64."""
        if self._host is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._host)
        return tensor.tolist()

    def least(self, *values: float) -> list[float]:
        """The least of each value over the group."""
        if self._host is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._host)
        return tensor.tolist()

    def stop_if(self, asked: bool) -> None:
        """Raise Interrupted in every process once it is asked of one; all call this equally often."""
        if any(self.sum(asked)):
            raise Interrupted("asked to stop")

    def from_main(self, value: Any) -> Any:
        """What the main process passed."""
        if self._host is None:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self._host)
        return holder[0]

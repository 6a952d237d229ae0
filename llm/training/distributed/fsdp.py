"""FSDP2: weights, gradients and optimizer state spread over the processes of a training, and whole again where it ends.

It is torch's own `fully_shard`, because accelerate 1.15 ignores its FSDP plugin on CPU in silence. Each layer gathers its
weights before it computes, in both directions, and lets go of them afterwards. What is in no layer (embedding, final norm,
head) belongs to the outermost module and stays gathered from a forward pass to the end of its backward pass.

All processes have to compute equally often: whoever computes, gathers, and gathering takes everybody.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llm.errors import InputError
from llm.training.loss import Learner

Strategy = Literal["single", "ddp", "fsdp"]  # one process alone has nothing to share


def shard(learner: Learner, strategy: Strategy, *, device: torch.device, processes: int) -> Learner:
    """`learner` on `device`; under "fsdp" another one, whose weights are spread over the processes.

    Then the model that was passed is a shell until `gather` fills it: a process never holds more than its share, and a layer.
    InputError where weights cannot be spread, such as those in four bits.
    """
    if strategy != "fsdp":
        return learner.to(device)
    for name, weight in learner.model.named_parameters():
        if not weight.is_floating_point() or weight.dim() == 0:
            raise InputError(
                f'parallel.strategy: expected "ddp" where a base is held in four bits, got "fsdp", and {name} of '
                f"{str(weight.dtype).removeprefix('torch.')}, which cannot be spread over processes"
            )
    same: dict[int, Any] = {id(tensor): tensor for tensor in (*learner.model.parameters(), *learner.model.buffers())}
    spreading = Learner(copy.deepcopy(learner.model, same), learner.objective, precision=learner.precision)
    mesh = init_device_mesh(device.type, (processes,))
    for module in reversed(list(spreading.modules())):  # inner ones first
        if isinstance(module, nn.ModuleList):
            for layer in module:
                _fully_shard(layer, mesh)
    _fully_shard(spreading, mesh)
    return spreading


def _fully_shard(module: nn.Module, mesh: DeviceMesh) -> None:
    whole_weights = [weight for weight in module.parameters() if not isinstance(weight, DTensor)]
    fully_shard(module, mesh=mesh)
    for weight in whole_weights:  # the shell still knows them, the shards are copies
        weight.data = weight.data.new_empty(0)


@torch.no_grad()
def gather(learner: Learner, shell: nn.Module) -> None:
    """Fill the model that `shard` left empty with the weights of `learner`, in ordinary memory and in every process."""
    if learner.model is shell:
        return
    reshard(learner)
    empty = dict(shell.named_parameters())
    for name, weight in learner.model.named_parameters():
        empty[name].data = full_tensor(weight).cpu()


def is_sharded(learner: nn.Module) -> bool:
    """Whether every weight of `learner` is spread over processes."""
    return isinstance(learner, FSDPModule) and all(isinstance(weight, DTensor) for weight in learner.parameters())


def reshard(learner: nn.Module) -> None:
    """Let go of gathered weights, as after a backward pass: what a validation gathered would be old after an update."""
    for module in learner.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of `tensor`. Where it is spread, every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, weight: Tensor) -> Tensor:
    """A copy of `value`, the same in every process, where `weight` is; spread as it is if the shape is the same."""
    if isinstance(weight, DTensor) and value.shape == weight.shape:
        value = value.to(weight.device)
        return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)  # nothing is sent
    return value.to(weight.device, copy=True)

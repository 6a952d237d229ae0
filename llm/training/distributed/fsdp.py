"""FSDP2: weights, gradients and optimizer state sharded over the processes of a training, and gathered at its end.

It is torch's own `fully_shard`, because accelerate 1.15 silently ignores its FSDP plugin on CPU. Each layer gathers its
weights before it computes, in both directions, and frees them afterwards; so does an embedding that is not the head. The rest
(final norm, head) belongs to the outermost module and stays gathered from a forward pass to the end of its backward pass.

A training in bf16 gathers weights in bf16 and adds gradients up in fp32; shards are in fp32. Autocast would keep a copy in
bf16 of every weight that was gathered, until the forward pass ends and, for the backward pass, after it.

All processes have to compute equally often: computing gathers weights, and gathering takes all processes.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llm.errors import InputError
from llm.training.loss import Learner

Strategy = Literal["single", "ddp", "fsdp"]  # one process alone has nothing to share


def shard(learner: Learner, strategy: Strategy, *, device: torch.device, processes: int) -> Learner:
    """`learner` on `device`; under "fsdp" another one, whose weights are sharded over the processes.

    The model that was passed is then empty until `gather` fills it: a process never holds more than its share, and a layer.
    InputError where weights cannot be sharded, such as those in four bits.
    """
    if strategy != "fsdp":
        return learner.to(device)
    for name, weight in learner.model.named_parameters():
        if not weight.is_floating_point() or weight.dim() == 0:
            raise InputError(
                f'parallel.strategy: expected "ddp" where a base is held in four bits, got "fsdp", and {name} of '
                f"{str(weight.dtype).removeprefix('torch.')}, which cannot be sharded over processes"
            )
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast does that
    if learner.precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    same: dict[int, Any] = {id(tensor): tensor for tensor in (*learner.model.parameters(), *learner.model.buffers())}
    sharded = Learner(copy.deepcopy(learner.model, same), learner.objective, precision=learner.precision)
    mesh = init_device_mesh(device.type, (processes,))
    for module in reversed(list(sharded.modules())):  # inner ones first
        if isinstance(module, nn.ModuleList):
            for layer in module:
                _fully_shard(layer, mesh, policy)
    embedding = sharded.model.embedding
    if embedding.weight is not sharded.model.lm_head.weight:
        _fully_shard(embedding, mesh, policy)
    embedding.register_forward_hook(_in_fp32)
    _fully_shard(sharded, mesh, policy)
    return sharded


def _in_fp32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """What layers add to is in fp32, as under autocast, whatever the weights are gathered in."""
    return output.float()


def _fully_shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    unsharded = [weight for weight in module.parameters() if not isinstance(weight, DTensor)]
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for weight in unsharded:  # the model that was passed still refers to them, and the shards are copies
        weight.data = weight.data.new_empty(0)


@torch.no_grad()
def gather(learner: Learner, model: nn.Module) -> None:
    """Fill the model that `shard` left empty with the weights of `learner`, in main memory and in every process."""
    if learner.model is model:
        return
    reshard(learner)
    empty = dict(model.named_parameters())
    for name, weight in learner.model.named_parameters():
        empty[name].data = full_tensor(weight).cpu()


def is_sharded(learner: nn.Module) -> bool:
    """Whether every weight of `learner` is sharded over processes."""
    return isinstance(learner, FSDPModule) and all(isinstance(weight, DTensor) for weight in learner.parameters())


def reshard(learner: nn.Module) -> None:
    """Free gathered weights, as a backward pass does: what a validation gathered would be out of date after an update."""
    for module in learner.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of `tensor`. Where it is sharded, every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, weight: Tensor) -> Tensor:
    """A copy of `value`, which is the same in every process, where `weight` is; sharded as it is if the shape is the same."""
    if isinstance(weight, DTensor) and value.shape == weight.shape:
        value = value.to(weight.device)
        return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)  # nothing is sent
    return value.to(weight.device, copy=True)

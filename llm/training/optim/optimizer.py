"""The optimizers of a training: AdamW, and Muon for the matrices of the layers.

The learning rate over time is not here: that is `llm.training.config.Schedule`.

Weight decay acts on matrices only: the two-dimensional weights inside the layers and an untied head. Embeddings (a tied head
among them) and norms are left out: a row of an embedding that rarely gets a gradient would only shrink.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llm.device import Precision
from llm.training.config import Optimizer, Schedule
from llm.training.optim.muon import Muon


def build_optimizers(
    model: nn.Module, settings: Optimizer, *, schedule: Schedule, muon_precision: Precision = "bf16"
) -> list[torch.optim.Optimizer]:
    """The optimizers of all weights that learn; each parameter group has its highest learning rate as `peak`."""
    matrices, embeddings, rest = [], [], []
    # A tied head is found once, under the embedding's name. LoRA's factors are matrices inside layers like any other.
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    muon: list[Tensor] = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if weight.dim() != 2:
            rest.append(weight)
        elif id(weight) in embedded:
            embeddings.append(weight)
        elif settings.kind == "muon" and "layers" in name.split(".") and "lora" not in name:
            muon.append(weight)
        else:
            matrices.append(weight)
    rate = schedule.learning_rate
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay, "peak": rate},
        {"params": embeddings + rest, "weight_decay": 0.0, "peak": rate},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    groups = [group for group in groups if group["params"]]
    if groups:
        betas = (settings.beta1, settings.beta2)
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=betas, eps=settings.epsilon, fused=True))
    if muon:
        peak = settings.muon_learning_rate
        dtype = torch.bfloat16 if muon_precision == "bf16" else torch.float32
        orthogonal = Muon(muon, lr=peak, momentum=settings.muon_momentum, weight_decay=settings.weight_decay, dtype=dtype)
        orthogonal.param_groups[0]["peak"] = peak
        optimizers.append(orthogonal)
    return optimizers


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Give every group `factor` times its highest rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor

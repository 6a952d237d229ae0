"""Weights that do not learn, held once, in 16 bits where that loses nothing; products cast what they need, when they need it.

Autocast makes a bf16 copy of each fp32 weight and keeps it for the backward pass: six bytes a weight. Here the backward pass
casts again instead of keeping a cast, and a weight whose only use is in bf16 products is held in bf16: two bytes, and the
same bits in every product. Norms stay in fp32, and so does an embedding that is not stored in 16 bits.

Letters: N positions, D inputs, O outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.functional import linear

from llm.device import Precision
from llm.layers.ops import compute_dtype
from llm.models.interface import LanguageModel


class FrozenProduct(Function):
    """x weightᵀ (..., O) of x (..., D) and a weight (O, D) that does not learn, of any floating dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        dtype = compute_dtype(x)
        ctx.save_for_backward(weight)  # not its cast
        ctx.dtype = x.dtype
        return linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (weight,) = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # (N, O)
        return (flat @ weight.to(grad.dtype)).view(*grad.shape[:-1], -1).to(ctx.dtype), None


class FrozenLinear(nn.Linear):
    """A linear layer whose weight may be of another dtype than its products, unless it learns."""

    def forward(self, input: Tensor) -> Tensor:
        """x (..., D) to (..., O), in the dtype of products."""
        if self.weight.requires_grad:
            return linear(input, self.weight, self.bias)
        out: Tensor = FrozenProduct.apply(input, self.weight)  # type: ignore[no-untyped-call]  # `apply` is untyped
        return out if self.bias is None else out + self.bias.to(out.dtype)


class FrozenEmbedding(nn.Embedding):
    """An embedding that gives fp32, the dtype of the residual stream, whatever the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Indices (...) to channels (..., D)."""
        return super().forward(input).float()


def freeze(model: LanguageModel) -> None:
    """Stop every weight of `model` from learning; linear layers and embedding keep the dtype that they have, all others become
    fp32.
    """
    model.requires_grad_(False)
    kept: set[int] = set()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            frozen = FrozenLinear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            frozen.bias = module.bias
            model.set_submodule(name, _as(frozen, module))
        elif type(module) is nn.Embedding:
            model.set_submodule(name, _as(FrozenEmbedding(module.num_embeddings, module.embedding_dim, device="meta"), module))
        else:
            continue
        kept.add(id(module.weight))
    for weight in model.parameters():
        if weight.is_floating_point() and id(weight) not in kept:
            weight.data = weight.data.float()


def _as(made: nn.Module, module: nn.Module) -> nn.Module:
    made.weight = module.weight
    return made.train(module.training)


def hold_once(model: LanguageModel, precision: Precision) -> None:
    """Hold each frozen matrix that only bf16 products read in bf16, which is what autocast would multiply with.

    A layer whose weights are read otherwise keeps its dtype: the rows' lengths (DoRA) are those of the exact weight, and so
    are the embedding's channels.
    """
    if precision != "bf16":
        return
    exact = {id(model.embedding.weight)}
    for module in model.modules():
        layer: Any = module
        if getattr(module, "lora_magnitude_vector", None):
            exact.add(id(layer.get_base_layer().weight))
    for module in model.modules():
        if isinstance(module, FrozenLinear) and not module.weight.requires_grad and id(module.weight) not in exact:
            module.weight.data = module.weight.data.to(torch.bfloat16)


@contextmanager
def hidden_weights(model: LanguageModel) -> Iterator[None]:
    """Frozen layers hold nothing in here: PEFT would round a new adapter to the dtype of the weight beside it."""
    held = {module: module.weight for module in model.modules() if isinstance(module, FrozenLinear)}
    for module, weight in held.items():
        module.weight = nn.Parameter(torch.empty(0, device=weight.device), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in held.items():
            module.weight = weight

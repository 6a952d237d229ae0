"""RMSNorm, rotary embedding and gated products with hand-written gradients: fewer passes over memory than autograd makes.

Between matrix products these passes dominate the time of a step; each operation keeps only its inputs for the backward pass.

Letters: B rows, T positions, H heads, E head size.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx
from torch.nn.functional import gelu, silu


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products of `x`: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(Function):
    """weight * x / sqrt(mean(x^2) + eps), returned in `dtype` (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:  # noqa: D102
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = (wide * scale).mul_(weight)
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: D102
        x, weight, scale = ctx.saved_tensors
        grad = grad.float()
        normal = x.float() * scale
        inward = grad * normal
        dweight = inward.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (inward @ weight.float()).div_(x.shape[-1])  # (...,): mean over channels of grad * weight * normal
        dx = (grad * weight).addcmul_(normal, mean[..., None], value=-1).mul_(scale)
        return dx.to(x.dtype), dweight, None, None


class Rotate(Function):
    """Rotary embedding of x (B, T, H, E), heads moved before positions: (B, H, T, E).

    The halves of a head are the two coordinates of each pair (Transformers' `rotate_half`); with fewer angles than pairs,
    those of its first channels, and the rest stays.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(cosine, sine)
        return _rotate_pairs(x.transpose(1, 2), cosine, sine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        cosine, sine = ctx.saved_tensors
        return _rotate_pairs(grad, cosine, -sine).transpose(1, 2), None, None


def _rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs of x (B, H, T, E) by angles (1 or B, 1, T, at most E / 2).

    Always in fp32: besides being exact, on CPU short strided runs of bf16 are 5 times as slow as casting both ways.
    """
    if (rotated := 2 * cosine.shape[-1]) < x.shape[-1]:
        return torch.cat([_rotate_pairs(x[..., :rotated], cosine, sine), x[..., rotated:]], -1)
    left, right = x.float().chunk(2, -1)
    if torch.compiler.is_compiling():  # the compiler fuses it into one pass, if each half is rounded before they are joined
        halves = (left * cosine - right * sine, right * cosine + left * sine)
        return torch.cat([half.to(x.dtype) for half in halves], -1)
    out = torch.empty(x.shape, device=x.device)
    torch.mul(left, cosine, out=out[..., : left.shape[-1]]).addcmul_(right, sine, value=-1)
    torch.mul(right, cosine, out=out[..., left.shape[-1] :]).addcmul_(left, sine)
    return out.to(x.dtype)


Gate = Literal["silu", "gelu"]


class GatedProduct(Function):
    """f(gate) * up (Shazeer 2020), where f is SiLU, or GELU in its form by tanh."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, function: Gate) -> Tensor:  # noqa: D102
        ctx.save_for_backward(gate, up)
        ctx.function = function
        return activate(gate, function).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        gate, up = ctx.saved_tensors
        by_gate = grad * up
        if ctx.function == "gelu":
            dgate = torch.ops.aten.gelu_backward(by_gate, gate, approximate="tanh")
        else:
            dgate = torch.ops.aten.silu_backward(by_gate, gate)
        return dgate, activate(gate, ctx.function).mul_(grad), None


def activate(gate: Tensor, function: Gate) -> Tensor:
    """f(gate)."""
    return gelu(gate, approximate="tanh") if function == "gelu" else silu(gate)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Root-mean-square normalization over the last dimension, in the dtype of the products that follow."""
    dtype = compute_dtype(x)
    out: Tensor = RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return out


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding: x (B, T, H, E), cosine and sine (1 or B, 1, T, at most E / 2). Returns (B, H, T, E)."""
    out: Tensor = Rotate.apply(x, cosine, sine)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return out


def in_halves(x: Tensor, rotated: int) -> Tensor:
    """x (..., E) with its first `rotated` channels in the order 0, 2, 4, ..., 1, 3, 5, ...: `rotate` turns neighbours then."""
    return torch.cat([x[..., 0:rotated:2], x[..., 1:rotated:2], x[..., rotated:]], -1)


def gated(gate: Tensor, up: Tensor, function: Gate) -> Tensor:
    """f(gate) * up."""
    out: Tensor = GatedProduct.apply(gate, up, function)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return out


def capped(x: Tensor, softcap: float) -> Tensor:
    """c tanh(x / c) for a `softcap` c; x itself for 0 (Gemma 2, Riviere et al. 2024)."""
    return softcap * (x / softcap).tanh() if softcap else x

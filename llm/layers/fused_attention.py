"""Causal attention inside documents as one C++ kernel: for training in bf16 on CPUs with AVX512-BF16.

`fused_attention.cpp` is built when a training first needs it (`cpp_kernel.py`). On other machines, and without a compiler,
`llm.layers.attention` multiplies blocks: equal up to rounding.

Letters: B rows, T positions, H query heads, K key and value heads, E head size.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from llm.layers.cpp_kernel import OPENMP, UnavailableError, load

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", OPENMP]
PANEL = 32  # positions and sizes come in multiples of it
# Positions of a row, at most. What the kernel keeps for the backward pass grows with their square: at 1,024, T bytes for each
# position, layer and head, less than all else that a layer keeps of a position (about 40 E bytes for each head).
LONGEST = 1024


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "length", "size")]


class _Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "head", "position"))]


def is_supported(length: int, size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel can compute attention of `length` positions with heads of `size`."""
    return length <= LONGEST and length % PANEL == 0 and size % PANEL == 0 and dtype == torch.bfloat16


@cache
def load_kernel() -> ctypes.CDLL:
    """The kernel, built on first use. UnavailableError where it cannot run."""
    if not is_cpu_supported():
        raise UnavailableError("expected a CPU with AVX512-BF16 and without AMX, since it is faster only there")
    kernel = load(SOURCE, FLAGS, folder="attention")
    kernel.weights_per_head.restype = ctypes.c_int64
    return kernel


def is_cpu_supported() -> bool:
    """Whether the kernel is faster than products of blocks on this CPU: oneDNN uses AMX, and the kernel does not."""
    return bool(torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported())


def attend(q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor) -> Tensor:
    """Attention of q (B, H, T, E) over k and v (B, K, T, E), scaled by 1/sqrt(E); each position sees those from `starts`
    (1 or B, T), int32, up to itself. The sizes have to be supported. Returns (B, H, T, E) in bf16."""
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))  # PEFT's layers may return another dtype
    out: Tensor = FusedAttention.apply(q, k, v, starts)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return out


class FusedAttention(Function):
    """Softmax attention by the kernel.

    For the backward pass it keeps the weights before they are divided by their sum, and the inverse of that sum. They take
    half a matrix (T, T) for each head, also where documents are short; the part outside of documents is never touched. Hence
    LONGEST.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:  # noqa: D102
        q, k, v = (_dense(x) for x in (q, k, v))
        rows, heads, length, size = q.shape
        out = q.new_empty(rows, length, heads, size).transpose(1, 2)  # the layout that the next layer reads
        weights = q.new_empty(rows, heads, load_kernel().weights_per_head(ctypes.c_int64(length)))
        inverse = torch.empty(rows, heads, length, dtype=torch.float32)
        _run(load_kernel().forward, q, k, v, out, weights, inverse, starts)
        ctx.save_for_backward(q, k, v, out, weights, inverse, starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: D102
        saved = ctx.saved_tensors  # read once: a second access would recompute a checkpointed layer again
        grad, dq, dk, dv = _dense(grad), *map(torch.empty_like, saved[:3])
        _run(load_kernel().backward, *saved, grad, dq, dk, dv)
        return dq, dk, dv, None


def _run(function: Any, *tensors: Tensor) -> None:
    """Call one of the kernel's two functions. MemoryError if it cannot allocate its panels."""
    q, k, v, out, weights, inverse, starts, *gradients = tensors
    rows, heads, length, size = q.shape
    shape = ctypes.byref(_Shape(rows, heads, k.shape[1], length, size))
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weights, inverse, starts))
    step = ctypes.c_int64(length if len(starts) > 1 else 0)
    threads = ctypes.c_int(torch.get_num_threads())
    if function(shape, *map(_heads, (q, k, v, out)), *pointers, step, threads, *map(_heads, gradients)):
        raise MemoryError


def _heads(x: Tensor) -> Any:
    return ctypes.byref(_Heads(x.data_ptr(), *x.stride()[:3]))


def _dense(x: Tensor) -> Tensor:
    """x in a layout that the kernel can read in pairs of elements, and write without overlap."""
    return x if x.stride(3) == 1 and x.stride(2) % 2 == 0 and 0 not in x.stride() else x.contiguous()

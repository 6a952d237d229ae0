"""Causal attention inside documents as one C++ kernel: for training in bf16 on CPUs with AVX512-BF16.

`fused_attention.cpp` is built by the machine's own compiler when a training first asks for it, and kept beside what
torch.compile has made. Elsewhere, and where a compiler is missing, `llm.attention` multiplies blocks, which is the same up to
rounding.

Letters: B rows, T positions, H query heads, K key and value heads, E head size.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import Function

from llm.compilation import compiler
from llm.precision import Precision

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++17", "-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-fopenmp"]
PANEL = 32  # positions and sizes come in multiples of it
# Building takes 2 s. It makes a step 5 to 20% faster, the more the longer its context and the more documents a row has, so it
# pays from 40 s on at the speed of a small model.
WORTH = 8e12  # floating-point operations of a training


class UnavailableError(Exception):
    """The kernel cannot be built or run here; says why."""


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "length", "size")]


class _Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "head", "position"))]


def resolve_fused_attention(wanted: bool | Literal["auto"], *, device: str, precision: Precision, flops: float) -> bool:
    """Whether a training of `flops` operations should use the kernel; whether it can be built is not asked yet."""
    if device != "cpu" or precision != "bf16" or not _cpu_fits():
        return False
    return flops > WORTH if wanted == "auto" else wanted


def fits(length: int, size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel computes attention of `length` positions with heads of `size`."""
    return length % PANEL == 0 and size % PANEL == 0 and dtype == torch.bfloat16


@cache
def library() -> ctypes.CDLL:
    """The kernel, built unless that has been done before. UnavailableError where it cannot run."""
    if not _cpu_fits():
        raise UnavailableError("this CPU is not one for which it is faster")
    program = compiler()
    if program is None:
        raise UnavailableError("there is no C++ compiler")
    name = hashlib.sha256(" ".join([program, *FLAGS]).encode() + SOURCE.read_bytes()).hexdigest()[:32]
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(folder or scratch) / "attention" / f"{name}.so"
        if not place.exists():
            _build(program, place)
        try:
            kernel = ctypes.CDLL(str(place))
        except OSError as error:
            raise UnavailableError(str(error)) from error
    kernel.weights_per_head.restype = ctypes.c_int64
    return kernel


def _cpu_fits() -> bool:
    # With AMX, plain products are several times as fast as this kernel's.
    return bool(torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported())


def _build(program: str, place: Path) -> None:
    partial = place.with_suffix(f".{os.getpid()}")  # others may build it at the same time
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        command = [program, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            lines = built.stderr.splitlines() or ["it failed"]
            raise UnavailableError(f"{program}: {next((line for line in lines if 'error' in line), lines[0])}")
        partial.replace(place)
    except OSError as error:
        raise UnavailableError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def attend(q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor) -> Tensor:
    """Attention of q (B, H, T, E) over k and v (B, K, T, E), scaled by 1/sqrt(E); each position sees those from `starts`
    (1 or B, T), int32, up to itself. All are bf16 and `fits`. Returns (B, H, T, E)."""
    out: Tensor = FusedAttention.apply(q, k, v, starts)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return out


class FusedAttention(Function):
    """Keeps weights before they are divided by their sum, and one over that sum, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:  # noqa: D102
        q, k, v = (_dense(x) for x in (q, k, v))
        rows, heads, length, size = q.shape
        out = q.new_empty(rows, length, heads, size).transpose(1, 2)  # as the layer behind it reads it
        weights = q.new_empty(rows, heads, library().weights_per_head(ctypes.c_int64(length)))
        inverse = torch.empty(rows, heads, length)
        library().forward(*_arguments(q, k, v, out, weights, inverse, starts))
        ctx.save_for_backward(q, k, v, out, weights, inverse, starts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: D102
        saved = ctx.saved_tensors  # once: asked again, layers that are recomputed would be so twice
        grad, dq, dk, dv = _dense(grad), *map(torch.empty_like, saved[:3])
        library().backward(*_arguments(*saved), *map(_heads, (grad, dq, dk, dv)))
        return dq, dk, dv, None


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, weights: Tensor, inverse: Tensor, starts: Tensor
) -> tuple[Any, ...]:
    """What both passes are given."""
    rows, heads, length, size = q.shape
    shape = ctypes.byref(_Shape(rows, heads, k.shape[1], length, size))
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weights, inverse, starts))
    step = length if len(starts) > 1 else 0
    return shape, *map(_heads, (q, k, v, out)), *pointers, ctypes.c_int64(step), ctypes.c_int(torch.get_num_threads())


def _heads(x: Tensor) -> Any:
    return ctypes.byref(_Heads(x.data_ptr(), *x.stride()[:3]))


def _dense(x: Tensor) -> Tensor:
    """With its last dimension whole in memory, and no element shared with another."""
    return x if x.stride(3) == 1 and 0 not in x.stride() else x.contiguous()

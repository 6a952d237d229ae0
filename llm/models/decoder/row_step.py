"""One decoding step of up to MOST_ROWS rows on a CPU, by the kernel `row_step.cpp`: for one text at a time, as in a chat.

It computes what `decode.py` computes, in one call, from the weights as the model holds them. Two to four rows read the weights
as often as one does.

Letters: R rows, D hidden size, H heads, K key and value heads, E head size, S cache slots, V vocabulary.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.layers.cpp_kernel import OPENMP, UnavailableError, load
from llm.models.decoder.model import Decoder, Layer
from llm.models.decoder.rope import Waves
from llm.models.options import Kind

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
MOST_ROWS = 4
DTYPES = (torch.bfloat16, torch.float32)


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "size", "rotated", "inner", "layers")),
        *((name, ctypes.c_int64) for name in ("is_gelu", "norm_over_heads", "neighbours")),
        *((name, ctypes.c_float) for name in ("epsilon", "score_scale", "residual_scale", "softcap")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("norms", ctypes.c_void_p * 4),
        ("inputs", _Matrix * 3),
        ("head_norms", ctypes.c_void_p * 2),
        ("output", _Matrix),
        ("gate_up", _Matrix * 2),
        ("down", _Matrix),
        ("window", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("layer", "row", "head"))]


@cache
def load_kernel() -> Any:
    """The kernel's one function, built on first use: without OpenMP for one thread. UnavailableError where it cannot be."""
    flags = ["-ffp-contract=fast", *FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])]
    try:
        library = load(SOURCE, [*flags, OPENMP], folder="decoding")
    except UnavailableError:
        library = load(SOURCE, flags, folder="decoding")
    function = library.row_step
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer] * 5 + [integer] + [pointer] * 4 + [ctypes.c_int] * 2
    return function


class RowStep:
    """The step of a few rows for a model whose projections are plain matrices. UnavailableError where there is no kernel."""

    def __init__(self, model: Decoder) -> None:
        config, parts = model.config, model.config.parts
        self.dtype = model.lm_head.weight.dtype
        if self.dtype not in DTYPES:
            raise UnavailableError(f"expected weights in bf16 or fp32, got {self.dtype}")
        self._run = load_kernel()
        self._held: list[Tensor] = []  # what the structures point at
        self._kinds = sorted(set(model.kinds))
        self._vocab_size = model.vocab_size
        self._shape = _Shape(
            *(config.hidden_size, config.heads, config.kv_heads, config.head_size, config.rotated_size),
            *(config.intermediate_size, config.layers, parts.gate == "gelu", parts.qk_norm == "whole"),
            parts.rotary_pairs == "neighbours",
            *(config.norm_eps, config.head_size**-0.5 * config.query_scale, parts.residual_scale, parts.attention_softcap),
        )
        layers = [self._layer(*pair, parts.window) for pair in zip(model.layers, model.kinds, strict=True)]  # type: ignore[arg-type]  # a ModuleList of Layer
        self._layers = (_Layer * len(layers))(*layers)
        self._final_norm = self._pointer(model.model.norm.scale.detach().float())
        (self._head,) = self._matrices([model.lm_head], [model.vocab_size])

    def logits(
        self, embedded: Tensor, stored: Tensor, positions: Tensor, angles: Mapping[Kind, tuple[Waves, Waves]]
    ) -> Tensor:
        """Logits (R, V) in fp32, as the head gives them, for embedded tokens (R, D) in fp32 at `positions` (R, 1).

        Their keys and values go to those slots of `stored` (layers, R, 2 K, S, E), and each row sees its own up to there.
        `angles` are the cosine and the signed sine (S, E) of each position, for queries and for keys, for each kind of layer.
        """
        rows = len(embedded)
        out = torch.empty(rows, self._vocab_size)
        assert rows <= MOST_ROWS and stored.stride()[3:] == (stored.shape[4], 1) and embedded.is_contiguous()
        tables = [table.data_ptr() for kind in self._kinds for pair in angles[kind] for table in pair]
        failed = self._run(
            *(ctypes.byref(self._shape), self._layers, ctypes.byref(_Cache(stored.data_ptr(), *stored.stride()[:3]))),
            *((ctypes.c_void_p * len(tables))(*tables), positions.data_ptr(), rows, embedded.data_ptr(), self._final_norm),
            *(ctypes.byref(self._head), out.data_ptr(), self.dtype == torch.bfloat16, torch.get_num_threads()),
        )
        if failed:
            raise MemoryError
        return out

    def _layer(self, layer: Layer, kind: Kind, window: int | None) -> _Layer:
        attention, feed_forward, shape = layer.self_attn, layer.mlp, self._shape
        normed = (attention.q_norm, attention.k_norm) if attention.qk_norm != "none" else (None, None)
        return _Layer(
            (ctypes.c_void_p * 4)(*(self._scale(layer.norm(place)) for place in range(4))),
            (_Matrix * 3)(*self._matrices(attention.inputs, attention.sizes)),
            (ctypes.c_void_p * 2)(*map(self._scale, normed)),
            *self._matrices([attention.o_proj], [shape.hidden]),
            (_Matrix * 2)(*self._matrices(feed_forward.inputs, [shape.inner] * 2)),
            *self._matrices([feed_forward.down_proj], [shape.hidden]),
            window or 0 if kind == "window" else 0,
            self._kinds.index(kind),
        )

    def _matrices(self, linears: Sequence[nn.Linear], sizes: list[int]) -> list[_Matrix]:
        """Those of `sizes` outputs that `linears` are, one after the other: each may hold several."""
        found: list[_Matrix] = []
        for linear in linears:
            left = sizes[len(found) :] if len(linears) == 1 else [linear.out_features]
            weights = torch.split_with_sizes(linear.weight.detach().contiguous(), left)
            biases = [None] * len(left) if linear.bias is None else torch.split_with_sizes(linear.bias.detach().float(), left)
            for weight, bias in zip(weights, biases, strict=True):
                assert weight.dtype == self.dtype
                bias_pointer = None if bias is None else self._pointer(bias)
                found.append(_Matrix(self._pointer(weight), bias_pointer, len(weight), linear.in_features))
        return found

    def _scale(self, norm: Any) -> int | None:
        return None if norm is None else self._pointer(norm.scale.detach().float())

    def _pointer(self, tensor: Tensor) -> int:
        self._held.append(tensor.contiguous())
        return self._held[-1].data_ptr()

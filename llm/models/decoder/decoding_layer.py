"""One layer of a decoder as decoding runs it: its weights arranged so that few operations compute it.

Letters: B rows, T new positions, D hidden size, H heads, K key and value heads, E head size.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llm.layers.ops import in_halves
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import CappedHead, Layer, RMSNorm
from llm.models.options import Kind

MANY_ROWS = 2  # of a product that is worth widening its weight
WIDENED = 2**24  # elements of a widened weight, at most: 64 MiB in fp32
Projection = Callable[[Tensor], Tensor]  # (B, T, inputs) to (B, T, outputs)


class DecodingLayer:
    """One decoder layer; projections of the same input are joined into one."""

    def __init__(self, layer: Layer, kind: Kind, config: DecoderConfig) -> None:
        attention, feed_forward = layer.self_attn, layer.mlp
        self.kind, self._config = kind, config
        self.norms = [None if (norm := layer.norm(place)) is None else _scale(norm) for place in range(4)]  # (D,) in fp32
        self.head_norms: list[Tensor] = []  # of queries (H or 1, E) and keys (K or 1, E), where they are normalized
        if attention.qk_norm != "none":
            self.head_norms = [_scale(norm).view(-1, attention.head_size) for norm in (attention.q_norm, attention.k_norm)]
        self.queries_keys_values = projection(*attention.inputs)  # to (H + 2 K) E channels
        self.output = projection(attention.o_proj)
        self.gate_up = projection(*feed_forward.inputs)
        self.down = projection(feed_forward.down_proj)

    def queries_and_new(self, normal: Tensor, rotation: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, E), and keys and values (B, T, 2 K, E), both of `dtype`, of what attention reads, (B T, 1, D).

        `rotation` is cosine and signed sine (B or 1, T, H + 2 K, E), with angle 0 for values.
        """
        config = self._config
        heads, kv_heads = config.heads, config.kv_heads
        joined = self.queries_keys_values(normal)
        joined = joined.view(-1, rotation[0].shape[1], heads + 2 * kv_heads, config.head_size).float()
        if self.head_norms:
            over = (-1,) if config.parts.qk_norm == "head" else (-2, -1)
            parts = torch.split_with_sizes(joined, (heads, kv_heads, kv_heads), 2)[:2]
            for part, weight in zip(parts, self.head_norms, strict=True):
                part.mul_((part.square().mean(over, keepdim=True) + config.norm_eps).rsqrt()).mul_(weight)
        if config.parts.rotary_pairs == "neighbours":
            rotated = in_halves(joined[:, :, : heads + kv_heads], config.rotated_size)
            joined = torch.cat([rotated, joined[:, :, heads + kv_heads :]], 2)
        # Each channel is rotated with that half a head away (Transformers' `rotate_half`); the sine has the signs.
        joined = torch.addcmul(joined * rotation[0], _swapped(joined, config.rotated_size), rotation[1]).to(dtype)
        q, new = torch.split_with_sizes(joined, (heads, 2 * kv_heads), 2)
        q = q.transpose(1, 2)
        return q if config.query_scale == 1 else q * config.query_scale, new


def _scale(norm: RMSNorm) -> Tensor:
    return norm.scale.detach().float()


def projection(*layers: nn.Linear) -> Projection:
    """The outputs of `layers` for one input, joined; a layer that is more than a matrix (an adapter, four bits) is called."""
    if not all(map(is_matrix, layers)):
        return partial(_called, layers=layers)
    weight = _joined([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    bias = _joined(biases) if biases else None
    if not _can_pack(weight):
        if product_dtype(weight) != weight.dtype:
            return partial(_widened_linear, weight=weight, bias=bias)
        return partial(linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise.default  # as torch.compile does for a frozen nn.Linear
    return lambda x: product(x, packed, bias, "none", [], "")


def _called(x: Tensor, *, layers: Sequence[nn.Linear]) -> Tensor:
    dtype = layers[0].weight.dtype  # of a weight in four bits, one of integers
    given = x.to(dtype) if dtype.is_floating_point else x
    return torch.cat([layer(given) for layer in layers], -1).to(x.dtype)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of what `weight` is multiplied by: fp32 for one in 16 bits on a CPU that would only imitate such products.

    Measured on one AVX2 core, 512 positions of SmolLM2-135M: more than half of the time were attention's products of values in
    bf16.
    """
    imitated = weight.device.type == "cpu" and weight.dtype.itemsize == 2 and not _can_pack(weight)
    return torch.float32 if imitated else weight.dtype


def _widened_linear(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of x in fp32 and a weight in 16 bits, on a CPU without units for them: the products of many rows are those of
    the widened weight, of which WIDENED elements are held at a time.

    Measured on one AVX2 core, a weight of 3,072 x 576, bf16 and widened: 0.37 and 0.47 ms for one row, 0.72 and 0.62 for two,
    2.91 and 1.31 for eight.
    """
    if x.numel() < MANY_ROWS * x.shape[-1]:
        return linear(x.to(weight.dtype), weight, bias).float()
    rows = max(1, WIDENED // weight.shape[1])
    parts = (weight[start : start + rows] for start in range(0, len(weight), rows))
    out = torch.cat([linear(x, part.float()) for part in parts], -1)
    return out if bias is None else out.add_(bias)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can keep the weight in its own layout, rather than reorder it in every product or leave it to BLAS.

    Measured on 2 cores with AVX512-BF16 at hidden 512, packed over plain: 1.8 times as fast in bf16 at 1 and 8 rows, in fp32
    2.7 and 2.9 times, and 2.3 times at 2048 rows.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def is_matrix(layer: nn.Module) -> bool:
    """Whether a layer is a matrix, with a bias or without, and nothing else: an adapter may be a subclass."""
    return type(layer) in (nn.Linear, CappedHead)  # decoding caps logits itself


def _swapped(x: Tensor, rotated: int) -> Tensor:
    """x (..., E) with the halves of its first `rotated` channels exchanged."""
    if rotated == x.shape[-1]:
        return x.roll(rotated // 2, -1)
    return torch.cat([x[..., :rotated].roll(rotated // 2, -1), x[..., rotated:]], -1)

"""One decoding step of one row on a CPU, compiled: for one text at a time, as in a chat.

It computes what `decode.py` computes, but torch.compile fuses a whole layer into one loop nest, which reads each weight once,
in the order in which the model holds it. Weights and slots are arguments, so one compilation serves all layers and all texts;
only the number of slots that are seen varies.

Letters as in `decode.py`, without B and T, which are 1.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llm.layers.ops import Gate, activate, capped, in_halves
from llm.models.decoder.model import Decoder, Layer
from llm.models.options import Kind

MOST_SHAPES = 64  # shapes of models in one process


class Shape(NamedTuple):
    """What all layers of a model have in common: each one is compiled once."""

    heads: int
    kv_heads: int
    epsilon: float
    rotated: int  # channels of a head
    neighbours: bool  # whether these are rotated in pairs of neighbours
    query_scale: float
    residual_scale: float
    gate: Gate
    norm_over_heads: bool  # whether queries and keys are normalized over all heads
    has_windows: bool
    softcap: float  # of scores


class LayerWeights(NamedTuple):
    """The weights of a layer; None where it has none."""

    norms: tuple[Tensor | None, ...]  # the four of `Family.norms_of`
    inputs: tuple[Tensor, ...]  # queries, keys and values, or one that is all of them
    input_biases: tuple[Tensor | None, ...]
    head_norms: tuple[Tensor, ...]  # of queries and keys, (H or 1, E)
    output: Tensor
    output_bias: Tensor | None
    gate_up: tuple[Tensor, ...]
    gate_up_biases: tuple[Tensor | None, ...]
    down: Tensor
    down_bias: Tensor | None


class CompiledRow:
    """The step of one row for a model whose projections are plain matrices. Call under `torch.inference_mode`.

    `cache` (layers, 2 K, S, E) holds keys and values, with more slots than the context, because no step may see all of them.
    """

    def __init__(self, model: Decoder, cache: Tensor) -> None:
        self.cache, self.kinds, self.window = cache, model.kinds, model.config.parts.window
        self._embedding, self._head = (part.weight.detach() for part in (model.model.embed_tokens, model.lm_head))
        self._layers = [_weights(layer) for layer in model.layers]  # type: ignore[arg-type]  # a ModuleList of Layer
        self._final_norm = model.model.norm.scale.detach().float()
        config, parts = model.config, model.config.parts
        self._embedding_scale, self._logit_divisor = model.embedding_scale, model.logit_divisor
        self._shape = Shape(
            config.heads,
            config.kv_heads,
            config.norm_eps,
            config.rotated_size,
            parts.rotary_pairs == "neighbours",
            config.query_scale,
            parts.residual_scale,
            parts.gate,
            parts.qk_norm == "whole",
            parts.window is not None,
            parts.attention_softcap,
        )
        self._final_softcap = parts.final_softcap
        # Each shape of a model is compiled once; beyond its default limit of 8, torch would run uncompiled, and slowly.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
        self._layer, self._logits = (torch.compile(function, dynamic=False) for function in (_layer, _logits))

    def logits(self, token: int, seen: Tensor, position: Tensor, angles: Mapping[Kind, tuple[Tensor, ...]]) -> Tensor:
        """Logits (1, V) in fp32 after `token` at `position` (1,), with the cosine and the signed sine (1, E) of that position
        for queries, and for keys, of each kind of layer.

        `seen` has one entry for each slot that is seen: up to that of the position.
        """
        # Not a "dynamic" size: Inductor would compile sums over up to 4,096 slots, and refuse to serve more by the same code.
        torch._dynamo.decorators.mark_unbacked(seen, 0, min=2, max=self.cache.shape[2] - 1)
        x = self._embedding[token].float() * self._embedding_scale
        first = {"window": position + 1 - self.window} if self.window is not None else {}
        everything = torch.zeros_like(position)
        for weights, stored, kind in zip(self._layers, self.cache.unbind(0), self.kinds, strict=True):
            x = self._layer(x, weights, stored, seen, position, first.get(kind, everything), *angles[kind], self._shape)
        logits = self._logits(x, self._final_norm, self._head, self._shape.epsilon, self._logit_divisor)[None]
        return capped(logits, self._final_softcap)


def _weights(layer: Layer) -> LayerWeights:
    attention, feed_forward = layer.self_attn, layer.mlp

    def biases(linears: list[nn.Linear]) -> tuple[Tensor | None, ...]:
        return tuple(None if linear.bias is None else linear.bias.detach().float() for linear in linears)

    return LayerWeights(
        norms=tuple(None if (norm := layer.norm(place)) is None else norm.scale.detach().float() for place in range(4)),
        inputs=tuple(linear.weight.detach() for linear in attention.inputs),
        input_biases=biases(attention.inputs),
        head_norms=tuple(
            norm.scale.detach().float().view(-1, attention.head_size)
            for norm in ((attention.q_norm, attention.k_norm) if attention.qk_norm != "none" else ())
        ),
        output=attention.o_proj.weight.detach(),
        output_bias=biases([attention.o_proj])[0],
        gate_up=tuple(linear.weight.detach() for linear in feed_forward.inputs),
        gate_up_biases=biases(feed_forward.inputs),
        down=feed_forward.down_proj.weight.detach(),
        down_bias=biases([feed_forward.down_proj])[0],
    )


def _layer(
    x: Tensor,
    weights: LayerWeights,
    stored: Tensor,
    seen: Tensor,
    position: Tensor,
    first: Tensor,
    query_cosine: Tensor,
    query_sine: Tensor,
    key_cosine: Tensor,
    key_sine: Tensor,
    shape: Shape,
) -> Tensor:
    """x (D,) after one layer, which sees slots from `first` on; its keys and values go to `position` of `stored` (2 K, S,
    E)."""
    size, heads, kv_heads = stored.shape[-1], shape.heads, shape.kv_heads
    normal = _norm(x, weights.norms[0], shape).to(weights.output.dtype)
    parts = [_product(*pair, normal) for pair in zip(weights.inputs, weights.input_biases, strict=True)]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    q, k, v = (
        part.view(-1, size) for part in torch.split_with_sizes(joined, [size * heads, size * kv_heads, size * kv_heads])
    )
    if weights.head_norms:
        over = (0, 1) if shape.norm_over_heads else (1,)
        q, k = (
            part * (part.square().mean(over, keepdim=True) + shape.epsilon).rsqrt() * weight
            for part, weight in zip((q, k), weights.head_norms, strict=True)
        )
    if shape.neighbours:
        q, k = in_halves(q, shape.rotated), in_halves(k, shape.rotated)
    q = q * query_cosine + _swapped(q, shape.rotated) * query_sine
    k = k * key_cosine + _swapped(k, shape.rotated) * key_sine
    stored[:, position] = torch.cat([k, v])[:, None]
    keys, values = stored[:, : len(seen)].chunk(2)  # (K, seen, E)
    grouped = q.view(kv_heads, heads // kv_heads, 1, size)  # the queries that share keys
    scores = (grouped * keys[:, None]).sum(-1) * (size**-0.5 * shape.query_scale)  # (K, G, seen)
    scores = capped(scores, shape.softcap)
    if shape.has_windows:
        scores = scores.masked_fill(seen < first, -torch.inf)
    mixed = (scores.softmax(-1)[..., None] * values[:, None]).sum(-2).flatten()
    out = _product(weights.output, weights.output_bias, mixed.to(weights.output.dtype))
    x = x + _norm(out, weights.norms[1], shape) * shape.residual_scale
    normal = _norm(x, weights.norms[2], shape).to(weights.down.dtype)
    halves = [_product(*pair, normal) for pair in zip(weights.gate_up, weights.gate_up_biases, strict=True)]
    gate, up = halves[0].chunk(2) if len(halves) == 1 else halves
    out = _product(weights.down, weights.down_bias, (activate(gate, shape.gate) * up).to(weights.down.dtype))
    return x + _norm(out, weights.norms[3], shape) * shape.residual_scale


def _logits(x: Tensor, norm: Tensor, head: Tensor, epsilon: float, divisor: float) -> Tensor:
    return _product(head, None, _rms_norm(x, norm, epsilon).to(head.dtype)) / divisor


def _norm(x: Tensor, weight: Tensor | None, shape: Shape) -> Tensor:
    return x if weight is None else _rms_norm(x, weight, shape.epsilon)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean() + epsilon).rsqrt() * weight


def _swapped(x: Tensor, rotated: int) -> Tensor:
    """x (N, E) with the halves of its first `rotated` channels exchanged; the sine of the rest is 0."""
    half = rotated // 2
    return torch.cat([x[:, half:rotated], x[:, :half], x[:, rotated:]], -1)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """weight (outputs, inputs) times x (inputs,), summed in fp32."""
    out = (weight.float() * x.float()).sum(-1)
    return out if bias is None else out + bias

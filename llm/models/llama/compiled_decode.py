"""One decoding step of one row on a CPU, compiled: for one text at a time, as in a chat.

It computes what `decode.py` computes, but torch.compile fuses a whole layer into one loop nest, which reads each weight once,
in the order in which the model holds it. Weights and slots are arguments, so one compilation serves all layers and all texts;
only the number of slots that are seen varies.

Letters as in `decode.py`, without B and T, which are 1.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from llm.models.llama.model import Layer, Llama

MOST_SHAPES = 64  # shapes of models in one process


class CompiledRow:
    """The step of one row for a model whose projections are plain matrices. Call under `torch.inference_mode`.

    `cache` (layers, 2 K, S, E) holds keys and values, with more slots than the context, because no step may see all of them.
    """

    def __init__(self, model: Llama, cache: Tensor) -> None:
        self.cache = cache
        self._embedding, self._head = (part.weight.detach() for part in (model.model.embed_tokens, model.lm_head))
        self._layers = [_weights(layer) for layer in model.layers]  # type: ignore[arg-type]  # a ModuleList of Layer
        self._final_norm = model.model.norm.weight.detach().float()
        self._sizes = model.config.heads, model.config.kv_heads, model.config.norm_eps
        # Each shape of a model is compiled once; beyond its default limit of 8, torch would run uncompiled, and slowly.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
        self._layer, self._logits = (torch.compile(function, dynamic=False) for function in (_layer, _logits))

    def logits(self, token: int, seen: Tensor, position: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Logits (1, V) in fp32 after `token` at `position` (1,), with the signed sine and the cosine (1, E) of that position.

        `seen` has one entry for each slot that is seen: up to that of the position.
        """
        torch._dynamo.mark_dynamic(seen, 0, min=2, max=self.cache.shape[2] - 1)
        x = self._embedding[token].float()
        for weights, stored in zip(self._layers, self.cache.unbind(0), strict=True):
            x = self._layer(x, weights, stored, seen, position, cosine, sine, *self._sizes)
        return self._logits(x, self._final_norm, self._head, self._sizes[-1])[None]


def _weights(layer: Layer) -> tuple[Tensor, ...]:
    """The weights of a layer, in the order in which `_layer` takes them apart."""
    attention, feed_forward = layer.self_attn, layer.mlp
    projections = (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj),
    )
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return *(norm.weight.detach().float() for norm in norms), *(linear.weight.detach() for linear in projections)


def _layer(
    x: Tensor,
    weights: tuple[Tensor, ...],
    stored: Tensor,
    seen: Tensor,
    position: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
    kv_heads: int,
    epsilon: float,
) -> Tensor:
    """x (D,) after one layer; its keys and values go to `position` of `stored` (2 K, S, E)."""
    attention_norm, feed_forward_norm, query, key, value, output, gate, up, down = weights
    size = stored.shape[-1]
    normal = _rms_norm(x, attention_norm, epsilon).to(query.dtype)
    q, k = (_product(weight, normal).view(-1, size) for weight in (query, key))
    q, k = (part * cosine + part.roll(size // 2, -1) * sine for part in (q, k))
    stored[:, position] = torch.cat([k, _product(value, normal).view(-1, size)])[:, None]
    keys, values = stored[:, : len(seen)].chunk(2)  # (K, seen, E)
    grouped = q.view(kv_heads, heads // kv_heads, 1, size)  # the queries that share keys
    shares = ((grouped * keys[:, None]).sum(-1) * size**-0.5).softmax(-1)  # (K, G, seen)
    mixed = (shares[..., None] * values[:, None]).sum(-2).flatten()
    x = x + _product(output, mixed.to(output.dtype))
    normal = _rms_norm(x, feed_forward_norm, epsilon).to(gate.dtype)
    inner = silu(_product(gate, normal)) * _product(up, normal)
    return x + _product(down, inner.to(down.dtype))


def _logits(x: Tensor, norm: Tensor, head: Tensor, epsilon: float) -> Tensor:
    return _product(head, _rms_norm(x, norm, epsilon).to(head.dtype))


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean() + epsilon).rsqrt() * weight


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """weight (outputs, inputs) times x (inputs,), summed in fp32."""
    return (weight.float() * x.float()).sum(-1)

"""A decoder of RMSNorm, rotary grouped-query attention and a gated feed-forward layer, with options, in plain PyTorch.

Modules, weight names and the rotary convention are those of Transformers' models of each family, so a checkpoint needs no
conversion and adapters attach by the same names. A row may hold several documents; attention stays inside each. How one token
at a time is decoded is in `decode.py`; what the options mean, in `llm.models.options`.

Letters: B rows, T positions, D hidden size, H heads, K key and value heads, E head size, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm.layers import packed_attention
from llm.layers.attention import AttentionMask, attend, attention_mask
from llm.layers.dropout import Dropout
from llm.layers.fused_attention import is_supported
from llm.layers.ops import capped, compute_dtype, gated, in_halves, rms_norm, rotate
from llm.models.decoder.config import DecoderConfig, attention_flops
from llm.models.decoder.rope import Angles, rope_angles
from llm.models.families import families
from llm.models.interface import LanguageModel, element_count


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a weight per channel, `offset` + weight."""

    def __init__(self, size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.offset = 1 if config.parts.norm_weight == "1 + w" else 0
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return rms_norm(x, self.scale, eps=self.eps)

    @property
    def scale(self) -> Tensor:
        """What the normalized channels are multiplied by."""
        return self.weight + self.offset if self.offset else self.weight


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        parts = config.parts
        self.head_size, self.qk_norm, self.query_scale = config.head_size, parts.qk_norm, config.query_scale
        heads, kv_heads, bias = config.heads * self.head_size, config.kv_heads * self.head_size, parts.attention_bias != "none"
        self.sizes = [heads, kv_heads, kv_heads]
        self.fused, self.neighbours, self.rotated = (
            parts.fused == "all",
            parts.rotary_pairs == "neighbours",
            config.rotated_size,
        )
        if self.fused:
            self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=bias)
        else:
            self.q_proj = nn.Linear(config.hidden_size, heads, bias=bias)
            self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=parts.attention_bias == "all")
        if self.qk_norm != "none":
            self.q_norm, self.k_norm = (
                RMSNorm(self.head_size if self.qk_norm == "head" else size, config) for size in (heads, kv_heads)
            )

    @property
    def inputs(self) -> list[nn.Linear]:
        """The projections of what attention reads, in the order queries, keys, values."""
        return [self.qkv_proj] if self.fused else [self.q_proj, self.k_proj, self.v_proj]

    def project(self, x: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) to queries (B, H, T, E), keys and values (B, K, T, E), rotated by `angles`."""
        shape = (*x.shape[:2], -1, self.head_size)
        if self.fused:
            q, k, v = self.qkv_proj(x).split(self.sizes, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(shape) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.neighbours:  # the same scores: both change their order
            q, k = in_halves(q, self.rotated), in_halves(k, self.rotated)
        q, k = (q.transpose(1, 2), k.transpose(1, 2)) if angles is None else (rotate(q, *angles[0]), rotate(k, *angles[1]))
        if self.query_scale != 1:
            q = q * self.query_scale
        return q, k, v.transpose(1, 2)

    def output(self, mixed: Tensor) -> Tensor:
        """Mixed values of the heads, (B, H, T, E), to (B, T, D)."""
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Gated feed-forward layer (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.parts.mlp_bias
        self.gate, self.fused = config.parts.gate, config.parts.fused != "none"
        if self.fused:
            self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(hidden, inner, bias=bias)
            self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    @property
    def inputs(self) -> list[nn.Linear]:
        """The projections of what it reads, in the order gate, up."""
        return [self.gate_up_proj] if self.fused else [self.gate_proj, self.up_proj]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        out: Tensor = self.down_proj(gated(gate, up, self.gate))
        return out


class CappedHead(nn.Linear):
    """An output head whose logits y are c tanh(y / c), in fp32."""

    def __init__(self, hidden_size: int, vocab_size: int, softcap: float) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.softcap = softcap

    def forward(self, input: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., V)."""
        return capped(super().forward(input).float(), self.softcap)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), with dropout on both branches; norms stand where `norms`
    says."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.norms, self.residual_scale = families()[config.name].norms_of(config.parts), config.parts.residual_scale
        self.softcap = config.parts.attention_softcap
        for name in filter(None, self.norms):
            self.add_module(name, RMSNorm(config.hidden_size, config))
        self.attention_dropout = Dropout(config.dropout)
        self.feed_forward_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, angles: Angles | None, *, mask: AttentionMask, compiled: bool) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        before, after = _compiled_halves() if compiled else (Layer.before_attention, Layer.after_attention)
        q, k, v = before(self, x, angles)
        out: Tensor = after(self, x, attend(q, k, v, mask=mask, softcap=self.softcap))
        return out

    def before_attention(self, x: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, T, D)."""
        return self.self_attn.project(self._norm(0, x), angles)

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Both residual branches, for x (B, T, D) and what attention made of its values, (B, H, T, E)."""
        x = self._add(x, self.attention_dropout(self._norm(1, self.self_attn.output(mixed))))
        return self._add(x, self.feed_forward_dropout(self._norm(3, self.mlp(self._norm(2, x)))))

    def norm(self, place: int) -> RMSNorm | None:
        """The norm at one of the four places, if there is one."""
        name = self.norms[place]
        return None if name is None else self.get_submodule(name)  # type: ignore[return-value]  # it is one

    def _norm(self, place: int, x: Tensor) -> Tensor:
        name = self.norms[place]
        out: Tensor = x if name is None else getattr(self, name)(x)
        return out

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + (branch if self.residual_scale == 1 else branch * self.residual_scale)


@cache
def _compiled_halves() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two halves of a layer, compiled: fewer passes over memory. One compilation serves all layers.

    Attention stays outside, because its shapes depend on where documents begin, and so does the embedding, because its
    compiled gradient adds in no fixed order.
    """
    return torch.compile(Layer.before_attention), torch.compile(Layer.after_attention)


class Stack(nn.Module):
    """Embedding, layers and final norm: everything but the head. `Decoder.hidden` computes it."""

    def __init__(self, config: DecoderConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.embedding_dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config)


class Decoder(LanguageModel):
    """The whole language model, with Transformers' names for modules and weights."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig, *, vocab_size: int) -> None:
        super().__init__(config, vocab_size=vocab_size)
        self.model = Stack(config, vocab_size=vocab_size)
        cap = config.parts.final_softcap
        sizes = config.hidden_size, vocab_size
        self.lm_head = CappedHead(*sizes, cap) if cap else nn.Linear(*sizes, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.kinds = config.kinds
        self.exact_in_llama_cpp = config.parts.gate != "gelu"  # ggml reads GELU from a table in fp16
        self.embedding_scale, self.logit_divisor = config.embedding_scale, config.parts.logit_divisor
        self._initialize()

    def _initialize(self) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.xavier_uniform_(weight)
                if self.config.init == "scaled" and name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.data.div_(math.sqrt(2 * self.config.layers))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding."""
        return self.model.embed_tokens

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.model.layers

    def forward(self, tokens: Tensor, *, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T); the arguments are those of `hidden`."""
        logits: Tensor = self.lm_head(self.hidden(tokens, documents=documents, positions=positions))
        return logits

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """The final hidden states (B, T, D), which the head reads.

        `documents` (B, T) numbers the document of each position (attention stays inside); `positions` (B, T) counts from the
        start of each document. Without them a row is one document.
        """
        length = tokens.shape[1]
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        x: Tensor = self.model.embedding_dropout(self.model.embed_tokens(tokens))
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # weights may be held in bf16; what the layers add up is not rounded to it
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        angles = {kind: rope_angles(self.config, positions, kind=kind) for kind in set(self.kinds)}
        fused = self.fused_attention and not self.config.parts.attention_softcap
        fused = fused and is_supported(length, self.config.head_size, compute_dtype(x))
        packed = packed_attention.is_supported(self.config.head_size, compute_dtype(x), x.device)
        kernels = {"fused": fused, "packed": packed and not self.config.parts.attention_softcap}
        masks = {
            window: attention_mask(length, documents=documents, device=tokens.device, window=window, **kernels)
            for window in {None, self.config.parts.window}
        }
        compiled = self.compiled and self.training
        for layer, kind in zip(self.model.layers, self.kinds, strict=True):
            mask = masks[self.config.parts.window if kind == "window" else None]
            if self.recompute and self.training:
                x = checkpoint(layer, x, angles[kind], mask=mask, compiled=compiled, use_reentrant=False)
            else:
                x = layer(x, angles[kind], mask=mask, compiled=compiled)
        out: Tensor = self.model.norm(x)
        return out if self.logit_divisor == 1 else out / self.logit_divisor

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of a forward and backward pass per position, as in `config.py`, and those of adapters."""
        products = sum(element_count(weight) for weight in self.model.layers.parameters() if weight.dim() == 2)
        products += self.lm_head.weight.numel()
        return 6.0 * products + attention_flops(self.config, context=context)


build = Decoder  # the registry's entry

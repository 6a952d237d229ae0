"""LLaMA: a decoder of RMSNorm, rotary grouped-query attention and SwiGLU, in plain PyTorch.

Modules, weight names and the rotary convention are those of Transformers' LlamaForCausalLM, so a checkpoint needs no
conversion and adapters attach by the same names. A row may hold several documents; attention stays inside each. How one token
at a time is decoded is in `decode.py`.

Letters: B rows, T positions, D hidden size, H heads, K key and value heads, E head size, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm.layers.attention import AttentionMask, attend, attention_mask
from llm.layers.dropout import Dropout
from llm.layers.fused_attention import is_supported
from llm.layers.ops import compute_dtype, rms_norm, rotate, swiglu
from llm.models.interface import LanguageModel, element_count
from llm.models.llama.config import LinearScaling, Llama3Scaling, LlamaConfig, attention_flops


def rope_frequencies(config: LlamaConfig, *, device: torch.device) -> Tensor:
    """Radians per position of each pair of channels, (E / 2,): base^(-2i / E) (Su et al. 2021), then `config.rope_scaling`."""
    exponent = torch.arange(0, config.head_size, 2, device=device, dtype=torch.int64).float() / config.head_size
    plain = 1.0 / config.rope_base**exponent
    match config.rope_scaling:
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            # By the number of turns within the original context; https://arxiv.org/abs/2407.21783 and the released code.
            turns = scaling.original_context / (2 * math.pi / plain)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0 slow, 1 fast
            return (1 - kept) * plain / scaling.factor + kept * plain
    return plain


def rope_angles(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (1 or B, 1, T, E / 2), of position * frequency, for positions (1 or B, T)."""
    angle = positions[:, None, :, None].float() * rope_frequencies(config, device=positions.device)
    return angle.cos(), angle.sin()


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a weight per channel."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return rms_norm(x, self.weight, eps=self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.heads * config.head_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_size, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_size, config.hidden_size, bias=False)

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) to queries (B, H, T, E), keys and values (B, K, T, E), rotated by `angles`."""
        shape = (*x.shape[:2], -1, self.head_size)
        q = rotate(self.q_proj(x).view(shape), *angles)
        k = rotate(self.k_proj(x).view(shape), *angles)
        return q, k, self.v_proj(x).view(shape).transpose(1, 2)

    def output(self, mixed: Tensor) -> Tensor:
        """Mixed values of the heads, (B, H, T, E), to (B, T, D)."""
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), with dropout on both branches."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention_dropout = Dropout(config.dropout)
        self.feed_forward_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], *, mask: AttentionMask, compiled: bool) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        before, after = _compiled_halves() if compiled else (Layer.before_attention, Layer.after_attention)
        q, k, v = before(self, x, angles)
        out: Tensor = after(self, x, attend(q, k, v, mask=mask))
        return out

    def before_attention(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, T, D)."""
        return self.self_attn.project(self.input_layernorm(x), angles)

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Both residual branches, for x (B, T, D) and what attention made of its values, (B, H, T, E)."""
        x = x + self.attention_dropout(self.self_attn.output(mixed))
        out: Tensor = x + self.feed_forward_dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


@cache
def _compiled_halves() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two halves of a layer, compiled: fewer passes over memory. One compilation serves all layers.

    Attention stays outside, because its shapes depend on where documents begin, and so does the embedding, because its
    compiled gradient adds in no fixed order.
    """
    return torch.compile(Layer.before_attention), torch.compile(Layer.after_attention)


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything but the head. `Llama.hidden` computes it."""

    def __init__(self, config: LlamaConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.embedding_dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)


class Llama(LanguageModel):
    """The whole language model, with Transformers' names for modules and weights."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, *, vocab_size: int) -> None:
        super().__init__(config, vocab_size=vocab_size)
        self.model = Decoder(config, vocab_size=vocab_size)
        self.lm_head = nn.Linear(config.hidden_size, vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._initialize()

    def _initialize(self) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.xavier_uniform_(weight)
                if self.config.init == "scaled" and name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.data.div_(math.sqrt(2 * self.config.layers))

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
        angles = rope_angles(self.config, positions)
        fused = self.fused_attention and is_supported(length, self.config.head_size, compute_dtype(x))
        mask = attention_mask(length, documents=documents, device=tokens.device, fused=fused)
        compiled = self.compiled and self.training
        for layer in self.model.layers:
            if self.recompute and self.training:
                x = checkpoint(layer, x, angles, mask=mask, compiled=compiled, use_reentrant=False)
            else:
                x = layer(x, angles, mask=mask, compiled=compiled)
        out: Tensor = self.model.norm(x)
        return out

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of a forward and backward pass per position, as in `config.py`, and those of adapters."""
        products = sum(element_count(weight) for weight in self.model.layers.parameters() if weight.dim() == 2)
        products += self.lm_head.weight.numel()
        return 6.0 * products + attention_flops(self.config, context=context)


build = Llama  # the registry's entry

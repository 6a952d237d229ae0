"""Causal attention inside documents: the one place that chooses how to compute it, on CPU and on GPU.

On CPU, plain matrix products (`llm.layers.blocked_attention`), or for long trainings in bf16 a kernel for the same
(`llm.layers.fused_attention`). On GPU, flash attention for packed documents (`llm.layers.packed_attention`, not yet run), or
SDPA. Nothing here draws random numbers: attention has no dropout.

Letters: B rows, T positions, H query heads, K key and value heads, G = H / K, E head size, S cache slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llm.layers import blocked_attention, fused_attention, packed_attention
from llm.layers.ops import capped


@dataclass(frozen=True)
class AttentionMask:
    """Which positions see which, computed once per batch and used by every layer."""

    starts: Tensor | None  # on CPU: (1 or B, T), where each one's document begins, or its window
    dense: Tensor | None = None  # elsewhere: (B, 1, T, T), True where visible; None means plain causal attention
    fused: bool = False  # whether the CPU's kernel computes it
    borders: Tensor | None = None  # for the GPU's kernel of packed documents, instead of `dense`: (N + 1,), where each begins
    window: int | None = None  # beside `borders`


def attention_mask(
    length: int,
    *,
    documents: Tensor | None,
    device: torch.device,
    fused: bool = False,
    packed: bool = False,
    window: int | None = None,
) -> AttentionMask:
    """The mask by which each of `length` positions sees itself and earlier ones of its document, at most `window` in all.

    `documents` is (B, T) or None; the positions of a document are contiguous. `fused` and `packed` make it for the
    kernels, which have to support the sizes.
    """
    if window is not None and window >= length:
        window = None
    if packed and documents is not None:
        return AttentionMask(None, borders=packed_attention.document_borders(documents), window=window)
    if device.type == "cpu":
        starts = _document_starts(length, documents)
        if window is not None:  # what a position sees begins where its document does, or its window
            starts = starts.maximum(torch.arange(1 - window, length + 1 - window, dtype=torch.int32))
        return AttentionMask(starts, fused=fused)
    if documents is None and window is None:
        return AttentionMask(None)
    if documents is None:
        documents = torch.zeros(1, length, dtype=torch.int32, device=device)
    seen = (documents[:, :, None] == documents[:, None, :]).tril()
    return AttentionMask(None, (seen if window is None else seen.triu(1 - window))[:, None])


def _document_starts(length: int, documents: Tensor | None) -> Tensor:
    """The first position of each one's document, (1 or B, T) int32."""
    if documents is None:
        return torch.zeros(1, length, dtype=torch.int32)
    begins = torch.zeros_like(documents, dtype=torch.int32)
    begins[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], torch.arange(1, length, dtype=torch.int32), 0)
    return begins.cummax(1).values


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask, softcap: float = 0.0) -> Tensor:
    """Attention of q (B, H, T, E) over k and v (B, K, T, E), scaled by 1/sqrt(E), under `mask`. Returns (B, H, T, E).

    With `softcap`, c, a scaled score s becomes c tanh(s / c) (Gemma 2, Riviere et al. 2024); the kernel does not compute it.
    """
    if mask.starts is not None:
        if mask.fused:
            assert not softcap
            return fused_attention.attend(q, k, v, starts=mask.starts)
        return blocked_attention.attend(q, k, v, starts=mask.starts, softcap=softcap)
    if mask.borders is not None:
        assert not softcap
        return packed_attention.attend(q, k, v, borders=mask.borders, window=mask.window)
    group = q.shape[1] // k.shape[1]
    if mask.dense is None and not softcap:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    # With a mask and heads that share keys, SDPA on a GPU has only its slow kernel, which holds all scores.
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if not softcap:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask.dense)
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril() if mask.dense is None else mask.dense
    return _capped(q, k, v, bias=torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf), softcap=softcap)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor, softcap: float = 0.0) -> Tensor:
    """Attention of new queries q (B, H, T, E) over cached k and v (B, K, S, E), all of one dtype, plus `bias` (B, 1, G T, S)
    on the scores, the same T rows for each of the G query heads that share keys. Returns (B, H, T, E)."""
    # Queries that share keys become queries of one head: no key is repeated, and every SDPA kernel supports it.
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, K, G T, E)
    if softcap:
        return _capped(grouped, k, v, bias=bias, softcap=softcap).view(q.shape)
    return scaled_dot_product_attention(grouped, k, v, attn_mask=bias).view(q.shape)


def _capped(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor, softcap: float) -> Tensor:
    """Attention with capped scores, by plain operations: no kernel of torch has them."""
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    return (capped(scores, softcap) + bias).softmax(-1).to(v.dtype) @ v

"""Causal attention inside documents: the one place that chooses how to compute it, on CPU and on GPU.

Letters: B rows, T positions, H query heads, K key and value heads, G = H / K, E head size, S cache slots.

On CPU, torch's flash kernel is several times slower than plain matrix products, forward and backward (73 against 430 GFLOP/s
in bf16 on one 2-core machine), and a boolean mask costs it as much as causal attention. So blocks of queries are multiplied
with the keys that they can see by plain batched products; keys before the first document of a block and after its last query
are skipped. Long trainings in bf16 use a kernel for the same (`llm.layers.fused_attention`). On GPU, SDPA does the work.
Nothing here draws random numbers: attention has no dropout.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.functional import scaled_dot_product_attention

from llm.layers import fused_attention

BLOCK = 128  # queries per block: best of 64, 128, 256 at T = 256 and 512 on 2 cores, bf16 and fp32


@dataclass(frozen=True)
class Block:
    """Queries `start..stop` see keys `first..stop`, plus `bias`."""

    start: int
    stop: int
    first: int
    bias: Tensor  # (1 or B, 1, 1, stop - start, stop - first) with document borders, else the last stop - start keys only


@dataclass(frozen=True)
class AttentionMask:
    """Which positions see which, computed once per batch and used by every layer."""

    blocks: tuple[Block, ...] | None  # on CPU
    dense: Tensor | None  # elsewhere: (B, 1, T, T), True where visible; None means plain causal attention
    starts: Tensor | None = None  # for the fused kernel, instead of both: (1 or B, T), where each one's document begins


def attention_mask(
    length: int, *, documents: Tensor | None, dtype: torch.dtype, device: torch.device, fused: bool = False
) -> AttentionMask:
    """The mask by which each of `length` positions sees itself and earlier ones of its document.

    `documents` is (B, T) or None; the positions of a document are contiguous. `fused` makes it for the kernel, which has to
    support the sizes.
    """
    if fused:
        return AttentionMask(None, None, _document_starts(length, documents))
    if device.type != "cpu":
        if documents is None:
            return AttentionMask(None, None)
        same = documents[:, :, None] == documents[:, None, :]
        return AttentionMask(None, same.tril()[:, None])
    if documents is not None and bool((documents == documents[:, :1]).all()):
        documents = None
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        rows = torch.arange(start, stop)[:, None]
        if documents is None:
            first = 0
            hidden = (torch.arange(start, stop) > rows)[None]
        else:
            # The first key that any row needs: where the document of the block's first query begins.
            same = documents[:, start : start + 1] == documents[:, : start + 1]
            first = int(same.int().argmax(1).min())
            hidden = (documents[:, start:stop, None] != documents[:, None, first:stop]) | (torch.arange(first, stop) > rows)
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        blocks.append(Block(start, stop, first, bias[:, None, None]))
    return AttentionMask(tuple(blocks), None)


def _document_starts(length: int, documents: Tensor | None) -> Tensor:
    """The first position of each one's document, (1 or B, T) int32."""
    if documents is None:
        return torch.zeros(1, length, dtype=torch.int32)
    begins = torch.zeros_like(documents, dtype=torch.int32)
    begins[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], torch.arange(1, length, dtype=torch.int32), 0)
    return begins.cummax(1).values


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask) -> Tensor:
    """Attention of q (B, H, T, E) over k and v (B, K, T, E), scaled by 1/sqrt(E), under `mask`. Returns (B, H, T, E)."""
    if mask.starts is not None:
        return fused_attention.attend(q, k, v, starts=mask.starts)
    if mask.blocks is None:
        group = q.shape[1] // k.shape[1]
        if mask.dense is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
        # With a mask and heads that share keys, SDPA on a GPU has only its slow kernel, which holds all scores.
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask.dense)
    out: Tensor = BlockedAttention.apply(q, k, v, mask.blocks)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return out


def attend_cached(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor) -> Tensor:
    """Attention of new queries q (B, H, T, E) over cached k and v (B, K, S, E), all of one dtype, plus `bias` (B, 1, G T, S)
    on the scores, the same T rows for each of the G query heads that share keys. Returns (B, H, T, E)."""
    # Queries that share keys become queries of one head: no key is repeated, and every SDPA kernel supports it.
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, K, G T, E)
    return scaled_dot_product_attention(grouped, k, v, attn_mask=bias).view(q.shape)


class BlockedAttention(Function):
    """Softmax attention by blocks of queries; keeps the probabilities for the backward pass.

    Scores and their gradients are in fp32 whatever the inputs are: a score of 16 in bf16 is off by up to 0.06, and so is the
    logarithm of its probability.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...]) -> Tensor:  # noqa: D102
        rows, kv_heads, length, size = k.shape
        group = q.shape[1] // kv_heads
        q, scale = q.view(rows, kv_heads, group, length, size), size**-0.5
        k, v = k.reshape(-1, length, size), v.reshape(-1, length, size)
        out = torch.empty_like(q)
        kept: list[Tensor] = []
        for block in blocks:
            width, keys = block.stop - block.start, block.stop - block.first
            part = q[:, :, :, block.start : block.stop].reshape(-1, group * width, size).float() * scale
            scores = torch.bmm(part, k[:, block.first : block.stop].transpose(1, 2).float())  # (B K, G width, keys)
            seen = scores.view(rows, kv_heads, group, width, keys)
            seen[..., keys - block.bias.shape[-1] :] += block.bias
            weights = torch.softmax(scores, -1).to(v.dtype)
            result = torch.bmm(weights, v[:, block.first : block.stop])
            out[:, :, :, block.start : block.stop] = result.view(rows, kv_heads, group, width, size)
            if any(ctx.needs_input_grad):  # else all of them together would be T x T for nothing
                kept.append(weights)
        ctx.save_for_backward(q * scale, k, v, *kept)
        ctx.blocks = blocks
        return out.view(rows, -1, length, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: D102
        q, k, v, *kept = ctx.saved_tensors
        rows, kv_heads, group, length, size = q.shape
        grad = grad.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, weights in zip(ctx.blocks, kept, strict=True):
            width, keys = block.stop - block.start, slice(block.first, block.stop)
            part = q[:, :, :, block.start : block.stop].reshape(-1, group * width, size)
            dout = grad[:, :, :, block.start : block.stop].reshape(-1, group * width, size)
            dv[:, keys].baddbmm_(weights.transpose(1, 2), dout)
            dweights = torch.bmm(dout.float(), v[:, keys].transpose(1, 2).float())
            dscores = torch._softmax_backward_data(dweights, weights.float(), -1, torch.float32).to(q.dtype)
            dq[:, :, :, block.start : block.stop] = torch.bmm(dscores, k[:, keys]).view(rows, kv_heads, group, width, size)
            dk[:, keys].baddbmm_(dscores.transpose(1, 2), part)
        shape = (rows, kv_heads, length, size)
        return (dq * size**-0.5).view(rows, -1, length, size), dk.view(shape), dv.view(shape), None

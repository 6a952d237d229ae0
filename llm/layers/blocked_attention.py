"""Causal attention inside documents by plain matrix products, for CPUs: fast on short rows, linear in memory on long ones.

torch's flash kernel for CPUs is several times slower than matrix products, forward and backward (73 against 430 GFLOP/s in
bf16 on one 2-core machine), and a boolean mask costs it as much as causal attention. So tiles of scores, of a size that
stays in the cache, are multiplied; keys before the first document of a tile and after its last query are skipped.

Nothing of size (T, T) is kept or made at once: the backward pass computes each tile's probabilities again, as flash attention
does (Dao et al. 2022). A tile has all keys of its queries, so that needs no statistics of the forward pass.

Letters: B rows, T positions, H query heads, K key and value heads, G = H / K, E head size, N pairs of row and key head in a
tile, W queries of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

QUERIES = 64  # of a tile: best of 64, 96, 128 at T = 256 and 512 in fp32, on one core
SCORES = 2**19  # of a tile, at least one head's: best of 2^17 to 2^20 and all at T = 512 and 2048, likewise


def attend(q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor, softcap: float = 0.0) -> Tensor:
    """Attention of q (B, H, T, E) over k and v (B, K, T, E), scaled by 1/sqrt(E); each position sees those from `starts`
    (1 or B, T) up to itself. Scores are capped by `softcap`. Returns (B, H, T, E).
    """
    k, v = k.to(q.dtype), v.to(q.dtype)  # PEFT's layers may return another dtype
    with torch.autocast(q.device.type, enabled=False):  # it would round scores to bf16
        out: Tensor = BlockedAttention.apply(q, k, v, starts, softcap)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return out


class BlockedAttention(Function):
    """Softmax attention by tiles; keeps its inputs alone.

    Scores and their gradients are in fp32 whatever the inputs are: a score of 16 in bf16 is off by up to 0.06, and so is the
    logarithm of its probability.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, softcap: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, starts)
        ctx.softcap = softcap
        shape = q.shape
        q, k, v, starts = _by_key_head(q, k, v, starts)
        out = torch.empty_like(q)
        scaled = q.to(_wide(q)) * q.shape[-1] ** -0.5
        for tile in _tiles(starts, group=q.shape[1]):
            mixed = torch.bmm(tile.weights(scaled, k, starts, softcap)[0].to(v.dtype), tile.keys_of(v))
            tile.queries_of(out).copy_(mixed.view(tile.shape(q)))
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # noqa: D102
        saved = ctx.saved_tensors  # read once: a second access would recompute a checkpointed layer again
        q, k, v, starts = _by_key_head(*saved)
        grad, scale, wide = grad.reshape(q.shape), q.shape[-1] ** -0.5, _wide(q)
        scaled = q.to(wide) * scale
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for tile in _tiles(starts, group=q.shape[1]):
            weights, slope = tile.weights(scaled, k, starts, ctx.softcap)
            dout = tile.queries_of(grad).flatten(1, 2)
            _add_product(tile.keys_of(dv), weights.to(v.dtype).mT, dout)
            dweights = torch.bmm(dout.to(wide), tile.keys_of(v).mT.to(wide))
            dscores = torch._softmax_backward_data(dweights, weights, -1, wide, grad_input=dweights)
            dscores = (dscores if slope is None else dscores.mul_(slope)).to(q.dtype)
            tile.queries_of(dq).copy_(torch.bmm(dscores, tile.keys_of(k)).view(tile.shape(q)))
            _add_product(tile.keys_of(dk), dscores.mT, tile.queries_of(q).flatten(1, 2))
        dq, dk, dv = (
            x.to(like.dtype).view(like.shape) for x, like in zip((dq.mul_(scale), dk.mul_(scale), dv), saved, strict=False)
        )
        return dq, dk, dv, None, None


@dataclass(frozen=True)
class _Tile:
    """Queries `start..stop` of some pairs of row and key head, with the keys `first..stop`.

    Keys before `latest` are hidden from the queries whose documents begin after them.
    """

    pairs: slice
    start: int
    stop: int
    first: int
    latest: int

    def queries_of(self, x: Tensor) -> Tensor:
        """Those of x (B K, G, T, E): (N, G, W, E)."""
        return x[self.pairs, :, self.start : self.stop]

    def keys_of(self, x: Tensor) -> Tensor:
        """Those of x (B K, T, E): (N, keys, E)."""
        return x[self.pairs, self.first : self.stop]

    def shape(self, q: Tensor) -> tuple[int, ...]:
        """(N, G, W, E) for q (B K, G, T, E)."""
        return (self.pairs.stop - self.pairs.start, q.shape[1], self.stop - self.start, q.shape[3])

    def weights(self, q: Tensor, k: Tensor, starts: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
        """Probabilities (N, G W, keys) of scaled q (B K, G, T, E) over k (B K, T, E), documents from `starts` (B K, T), and
        the slope of the cap on scores, if there is one."""
        count, group, width, _ = self.shape(q)
        scores, slope = torch.bmm(self.queries_of(q).flatten(1, 2), self.keys_of(k).mT.to(q.dtype)), None
        if softcap:
            share = scores.div_(softcap).tanh_()
            scores, slope = share * softcap, share.square_().neg_().add_(1)
        seen = scores.view(count, group, width, -1)
        seen[..., self.start - self.first :] += torch.full((width, width), -torch.inf).triu_(1)
        if self.latest > self.first:
            hidden = torch.arange(self.first, self.latest) < starts[self.pairs, self.start : self.stop, None]
            seen[..., : self.latest - self.first].masked_fill_(hidden[:, None], -torch.inf)
        return torch.softmax(scores, -1, out=scores), slope


def _tiles(starts: Tensor, *, group: int) -> Iterator[_Tile]:
    """The tiles for `starts` (B K, T) and G = `group`."""
    pairs, length = starts.shape
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        first, latest = starts[:, start].tolist(), starts[:, stop - 1].tolist()
        count = max(1, SCORES // (group * (stop - start) * (stop - min(first))))
        for pair in range(0, pairs, count):
            chosen = slice(pair, min(pair + count, pairs))
            yield _Tile(chosen, start, stop, min(first[chosen]), max(latest[chosen]))


def _by_key_head(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q as (B K, G, T, E), k and v as (B K, T, E), starts as (B K, T)."""
    rows, kv_heads, length, size = k.shape
    starts = starts.expand(rows, length).repeat_interleave(kv_heads, 0)
    return q.reshape(rows * kv_heads, -1, length, size), k.reshape(-1, length, size), v.reshape(-1, length, size), starts


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the products of a and b to `total`, whose dtype may be wider."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))

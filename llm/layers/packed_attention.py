"""Attention inside packed documents on a GPU, by the kernel of `torch.nn.attention.varlen` (flash attention).

It reads where each document begins, instead of a mask of (B, 1, T, T) in every layer, computes nothing between documents, and
takes heads that share keys as they are. It has been written by torch's documentation and **not yet run on a GPU**: tests
compare what it is given with the attention of the CPU, and the devices of its tensors.

Letters: B rows, T positions, H query heads, K key and value heads, E head size, N documents of all rows.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

AMPERE = (8, 0)  # flash attention needs it, or later
WIDEST_HEAD = 256


def is_supported(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel computes heads of this size and dtype on this device."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_size <= WIDEST_HEAD
        and head_size % 8 == 0
        and torch.cuda.get_device_capability(device) >= AMPERE
    )


@cache
def kernel() -> tuple[Callable[..., Any], bool]:
    """torch's kernel, whose module imports the compiler, and whether it takes heads that share keys: since torch 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def document_borders(documents: Tensor) -> Tensor:
    """The first position of each document of all rows, which follow each other, and the end of the last: (N + 1,) int32.

    `documents` is (B, T); padding is a document, too.
    """
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    (starts,) = begins.flatten().nonzero(as_tuple=True)
    end = torch.full((1,), documents.numel(), dtype=torch.int32, device=documents.device)
    return torch.cat([starts.int(), end])


def attend(q: Tensor, k: Tensor, v: Tensor, *, borders: Tensor, window: int | None) -> Tensor:
    """Attention of q (B, H, T, E) over k and v (B, K, T, E), scaled by 1/sqrt(E). Returns (B, H, T, E).

    A position sees itself and the earlier ones of its document, at most `window` in all.
    """
    rows, heads, length, size = q.shape
    varlen_attn, takes_groups = kernel()
    if not takes_groups:
        k, v = (one.repeat_interleave(heads // one.shape[1], 1) for one in (k, v))
    q, k, v = (one.to(v.dtype).transpose(1, 2).reshape(rows * length, -1, size) for one in (q, k, v))
    groups: dict[str, Any] = {"enable_gqa": k.shape[1] != heads} if takes_groups else {}
    # No document is longer than a row; how long the longest is would have to be fetched from the GPU.
    found = varlen_attn(
        q, k, v, borders, borders, length, length, window_size=(-1 if window is None else window - 1, 0), **groups
    )
    assert isinstance(found, Tensor)
    return found.view(rows, length, heads, size).transpose(1, 2)

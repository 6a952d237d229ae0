"""The GPU's attention for packed documents: what its kernel is given, as far as that can be known without a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from llm.layers import packed_attention
from llm.layers.attention import AttentionMask, attend, attention_mask
from tests.llm.layers.test_attention import DOCUMENTS, documents_of

Window = tuple[int, int]


def as_documented(
    q: Tensor, k: Tensor, v: Tensor, q_borders: Tensor, k_borders: Tensor, q_most: int, k_most: int, **options: Any
) -> Tensor:
    """What torch's documentation says of `varlen_attn`, one sequence after the other; its kernel is for GPUs alone."""
    window: Window = options.get("window_size", (-1, -1))
    assert window[1] == 0 and q_borders.dtype == k_borders.dtype == torch.int32
    assert options.get("enable_gqa", False) == (q.shape[1] != k.shape[1])
    found = []
    for start, stop in zip(q_borders[:-1].tolist(), q_borders[1:].tolist(), strict=True):
        assert 0 < stop - start <= min(q_most, k_most)
        parts = (one[start:stop].transpose(0, 1)[None] for one in (q, k, v))
        places = torch.arange(stop - start)
        seen = places[:, None] >= places
        if window[0] >= 0:
            seen &= places[:, None] - places <= window[0]
        found.append(scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("groups", [True, False])  # whether the kernel takes them: since torch 2.12
@pytest.mark.parametrize("window", [None, 1, 9, 100])
@pytest.mark.parametrize("lengths", DOCUMENTS[1:5])
def test_the_kernel_is_given_what_the_attention_of_the_cpu_computes(
    monkeypatch: pytest.MonkeyPatch, groups: bool, window: int | None, lengths: list[list[int]]
) -> None:
    monkeypatch.setattr(packed_attention, "kernel", lambda: (as_documented, groups))
    torch.manual_seed(0)
    documents = documents_of(lengths)
    documents[-1, -1:] = -1  # padding
    rows, length = documents.shape
    q, k, v = (torch.randn(rows, heads, length, 16, requires_grad=True) for heads in (4, 2, 2))
    grad = torch.randn(q.shape)
    found = []
    for packed in (True, False):
        mask = attention_mask(length, documents=documents, device=q.device, packed=packed, window=window)
        assert (mask.borders is None) != packed and mask.dense is None
        out = attend(q, k, v, mask=mask)
        found.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for ours, blocked in zip(*found, strict=True):
        torch.testing.assert_close(ours, blocked, atol=1e-5, rtol=1e-5)


def test_the_kernel_takes_the_options_that_it_is_given_on_tensors_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def watched(*tensors: Any, **options: Any) -> Any:
        given.extend(one for one in tensors if isinstance(one, Tensor))
        return varlen_attn(*tensors, **options)

    takes_groups = packed_attention.kernel()[1]
    monkeypatch.setattr(packed_attention, "kernel", lambda: (watched, takes_groups))
    with FakeTensorMode(), torch.no_grad():  # a build without CUDA computes neither gradients nor indexing of such tensors
        q, k, v = (torch.zeros(2, heads, 64, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
        borders = torch.zeros(6, dtype=torch.int32, device="cuda")
        for window in (None, 8):
            out = attend(q, k, v, mask=AttentionMask(None, borders=borders, window=window))
            assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
    assert len(given) == 10 and {one.device.type for one in given} == {"cuda"}


def test_other_machines_and_precisions_do_not_use_the_kernel() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not packed_attention.is_supported(64, torch.bfloat16, cpu)
    for size, dtype in ((64, torch.float32), (60, torch.bfloat16), (512, torch.bfloat16)):
        assert not packed_attention.is_supported(size, dtype, cuda)

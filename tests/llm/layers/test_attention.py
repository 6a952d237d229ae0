"""Attention by blocks and by SDPA: equal values and gradients, none from masked positions, and nothing of size (T, T)."""

from typing import Any

import pytest
import torch
from tiny_training import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm.layers import blocked_attention
from llm.layers.attention import AttentionMask, attend, attention_mask

# Document lengths of rows, as long as each other: alone, inside and across the 128 queries of a block.
DOCUMENTS = [
    [[1]],
    [[7], [7]],
    [[20, 13], [33], [1, 32]],
    [[129]],
    [[128, 1], [1, 128], [129]],
    [[100, 130, 27], [257], [1, 255, 1], [128, 128, 1]],
]


def documents_of(lengths: list[list[int]]) -> Tensor:
    return torch.tensor([[document for document, n in enumerate(row) for _ in range(n)] for row in lengths])


@pytest.mark.parametrize("shared_by", [1, 2, 4])
@pytest.mark.parametrize("head_size", [32, 64, 96, 128])
@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("told", [True, False])
def test_blocked_attention_equals_sdpa_in_values_and_gradients(
    shared_by: int, head_size: int, lengths: list[list[int]], told: bool
) -> None:
    torch.manual_seed(0)
    documents = documents_of(lengths) if told else None
    rows, length = documents_of(lengths).shape
    shapes = [(rows, 4, length, head_size), *2 * [(rows, 4 // shared_by, length, head_size)]]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    same = None if documents is None else (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    blocks = attention_mask(length, documents=documents, device=q.device)
    assert blocks.starts is not None
    grad = torch.randn(shapes[0])
    found = []
    for mask in (blocks, AttentionMask(None, same)):  # the second as on a GPU
        out = attend(q, k, v, mask=mask)
        found.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for ours, sdpa in zip(*found, strict=True):
        torch.testing.assert_close(ours, sdpa, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 9, 64, 100, 300])
@pytest.mark.parametrize("lengths", [None, *DOCUMENTS[2:]])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_a_window_hides_what_is_farther_back_in_values_and_gradients(
    window: int, lengths: list[list[int]] | None, softcap: float
) -> None:
    torch.manual_seed(0)
    documents = None if lengths is None else documents_of(lengths)
    rows, length = (1, 200) if documents is None else documents.shape
    q = torch.randn(rows, 4, length, 32, requires_grad=True)
    k, v = (torch.randn(rows, 2, length, 32, requires_grad=True) for _ in range(2))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = ((distance >= 0) & (distance < window))[None]
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    blocks = attention_mask(length, documents=documents, device=torch.device("cpu"), window=window)
    grad = torch.randn_like(q)
    found = []
    for mask in (blocks, AttentionMask(None, seen[:, None])):  # the second as on a GPU
        out = attend(q, k, v, mask=mask, softcap=softcap)
        found.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for ours, sdpa in zip(*found, strict=True):
        torch.testing.assert_close(ours, sdpa, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("spread", [1, 4, 16])  # standard deviation of the scores
@pytest.mark.parametrize("in_training", [False, True])  # training computes under autocast
def test_in_bf16_values_and_gradients_are_as_near_to_exact_ones_as_those_of_sdpa(
    spread: int, length: int, in_training: bool
) -> None:
    torch.manual_seed(0)
    shapes = [(2, 4, length, 32), *2 * [(2, 2, length, 32)]]
    q, k, v = (
        torch.randn(shape).mul_(factor).bfloat16() for shape, factor in zip(shapes, (spread**0.5, spread**0.5, 1), strict=True)
    )
    grad = torch.randn(shapes[0]).bfloat16()
    blocks = attention_mask(length, documents=None, device=q.device)

    def computed(mask: AttentionMask, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=in_training and dtype == torch.bfloat16):
            out = attend(*inputs, mask=mask)
        return [x.double() for x in (out, *torch.autograd.grad(out, inputs, grad.to(dtype)))]

    exact, by_sdpa = (computed(AttentionMask(None), dtype) for dtype in (torch.float64, torch.bfloat16))
    for ours, theirs, wanted in zip(computed(blocks, torch.bfloat16), by_sdpa, exact, strict=True):
        error, of_sdpa = ((x - wanted).norm() / wanted.norm() for x in (ours, theirs))
        assert error < 1.5 * of_sdpa


@pytest.mark.parametrize("by_blocks", [True, False])
def test_attention_has_exactly_no_gradient_to_the_future_or_another_document(by_blocks: bool) -> None:
    torch.manual_seed(0)
    documents = documents_of(DOCUMENTS[-1])
    rows, length = documents.shape
    same = (documents[:, :, None] == documents[:, None, :]).tril()
    mask = AttentionMask(None, same[:, None])
    if by_blocks:
        mask = attention_mask(length, documents=documents, device=torch.device("cpu"))
    q = torch.randn(rows, 4, length, 32)
    k, v = (torch.randn(rows, 2, length, 32, requires_grad=True) for _ in range(2))
    out = attend(q, k, v, mask=mask)
    for position in (0, 1, 99, 100, 127, 128, 129, 230, 256):
        reached = torch.autograd.grad(out[:, :, position].square().sum(), (k, v), retain_graph=True)
        assert torch.equal((reached[1] != 0).any(3).any(1), same[:, position])
        assert not ((reached[0] != 0).any(3).any(1) & ~same[:, position]).any()


@pytest.mark.parametrize("scores", [1, 3000, 2**19])
def test_the_size_of_a_tile_changes_nothing(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = documents_of(DOCUMENTS[-1])
    rows, length = documents.shape
    torch.manual_seed(0)
    q = torch.randn(rows, 4, length, 32, requires_grad=True)
    k, v = (torch.randn(rows, 2, length, 32, requires_grad=True) for _ in range(2))
    found = []
    for size in (2**30, scores):
        monkeypatch.setattr(blocked_attention, "SCORES", size)
        out = attend(q, k, v, mask=attention_mask(length, documents=documents, device=q.device))
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for whole, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, in_parts, atol=1e-5, rtol=1e-5)


def kept_bytes(length: int) -> int:
    """What the forward pass of a tiny model keeps of a row with 3 documents for its backward pass."""
    kept: dict[int, torch.UntypedStorage] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    model = tiny_model(context=length).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    documents = torch.arange(length)[None] * 3 // length
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.hidden(torch.zeros(1, length, dtype=torch.int64), documents=documents)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def test_a_row_four_times_as_long_keeps_four_times_the_bytes() -> None:
    assert kept_bytes(4096) == pytest.approx(4 * kept_bytes(1024), rel=0.02)


def test_no_tensor_grows_with_the_square_of_the_row() -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else [out]:
                self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return out

    length = 4096
    documents = documents_of([[length // 2, length // 4, length // 4], [length - 1, 1, 0]])
    q, k, v = (torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        out = attend(q, k, v, mask=attention_mask(length, documents=documents, device=q.device))
        torch.autograd.grad(out.sum(), (q, k, v))
    assert largest.numbers <= blocked_attention.SCORES < length**2 / 8

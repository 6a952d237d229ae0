"""Head and cross-entropy in chunks: what large vocabularies cost, and that they cost no exactness."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.data.batch import IGNORE
from llm.training.loss import cross_entropy_sum, token_losses


class Made(TorchDispatchMode):
    """Every operation by name, with the shapes that it returns, and the storages of each size."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.shapes.append((func.__name__, tuple(value.shape)))
                storage = value.untyped_storage()
                self.storages[storage._cdata] = storage  # kept, so that no other gets its address
        return result


def wrapped(head: nn.Linear) -> nn.Module:
    """The head as inside an adapter: called as a module, not known as a matrix."""
    module = nn.Sequential(head)
    module.out_features = head.out_features  # type: ignore[assignment]
    return module


def head_of(vocabulary: int, hidden_size: int, rows: int) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(hidden_size, vocabulary, bias=False)
    targets = torch.randint(vocabulary, (rows,))
    return head, torch.randn(rows, hidden_size, requires_grad=True), targets


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
def test_chunks_do_not_shrink_with_the_vocabulary(whole: bool, precision: torch.dtype) -> None:
    with FakeTensorMode(), Made() as made:  # nothing is computed, so sizes may be real ones
        head, hidden, targets = head_of(131_072, 64, 2048)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            cross_entropy_sum(head if whole else wrapped(head), hidden, targets)
    rows = [shape[0] for name, shape in made.shapes if "softmax" in name]
    assert rows == [512] * 4


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_large_head_exists_once(precision: torch.dtype) -> None:
    with FakeTensorMode():
        head, hidden, targets = head_of(131_072, 64, 2048)
        with Made() as made:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                total = cross_entropy_sum(head, hidden, targets)
            (total * 0.5).backward()
    size = 4 * head.weight.numel()
    weight = head.weight.untyped_storage()._cdata
    as_large = [address for address, storage in made.storages.items() if storage.nbytes() == size and address != weight]
    assert head.weight.grad is not None
    assert as_large == [head.weight.grad.untyped_storage()._cdata]


def test_many_chunks_and_parts_of_the_weight_equal_cross_entropy_of_all_logits_at_once() -> None:
    head, hidden, targets = head_of(16_385, 8, 600)
    targets[::3] = IGNORE
    found = []
    for module in (head, wrapped(head)):
        total = cross_entropy_sum(module, hidden, targets)
        found.append((total, *torch.autograd.grad(total * 0.5, (hidden, head.weight))))
    total = cross_entropy(head(hidden), targets, ignore_index=IGNORE, reduction="sum")
    expected = (total, *torch.autograd.grad(total * 0.5, (hidden, head.weight)))
    for values in found:
        for value, wanted in zip(values, expected, strict=True):
            torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    losses = token_losses(head, hidden, targets)
    torch.testing.assert_close(losses, cross_entropy(head(hidden), targets, ignore_index=IGNORE, reduction="none"))


def test_small_vocabularies_keep_the_chunks_that_were_measured_for_them() -> None:
    with FakeTensorMode(), Made() as made:
        head, hidden, targets = head_of(6144, 64, 4096)
        cross_entropy_sum(head, hidden, targets)
    assert [shape[0] for name, shape in made.shapes if "softmax" in name] == [1024] * 4

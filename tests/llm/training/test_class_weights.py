"""Class weights: rows of a label count more in the loss, whatever they are packed with and whoever computes them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from tiny_training import VOCABULARY, tiny_model, tiny_training
from torch import nn
from torch.nn.functional import cross_entropy

from llm.data.batch import IGNORE, Batch, collate
from llm.data.chat_dataset import write_rows
from llm.data.chat_parts import Table
from llm.data.class_weights import class_factors
from llm.data.conversations import Template
from llm.data.mixture import mixed
from llm.data.packing import PackedRows, StreamWriter
from llm.errors import InputError
from llm.tokenizer.train_bpe import train_bpe
from llm.training.config import Budget, Optimizer, Schedule
from llm.training.loss import cross_entropy_sum, next_token_loss

CONTEXT = 24


def packed(folder: Path, weights: list[float]) -> PackedRows:
    """Chats of random tokens whose targets have these weights, packed into rows."""
    random = np.random.default_rng(1)
    with StreamWriter(folder) as writer:
        for weight in weights:
            ids = random.integers(1, VOCABULARY, size=int(random.integers(5, 12))).tolist()
            writer.append(ids, [False] * 2 + [True] * (len(ids) - 2), full_length=len(ids))
            writer.end_group(1, weight=weight)
    writer.pack(row_lengths=[CONTEXT], padding=0)
    return PackedRows(folder, seed=3)


def batch_of(rows: PackedRows) -> Batch:
    every = range(rows.rows_per_epoch)
    return collate([rows.row(index) for index in every], list(every))


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_weighted_loss_and_its_gradients_are_those_of_cross_entropy_target_by_target(wrapped: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 50, bias=False)
    head: nn.Module = plain
    if wrapped:  # as with an adapter on the head
        head = nn.Sequential(plain)
        head.out_features = 50  # type: ignore[assignment]
    hidden, targets = torch.randn(700, 8, requires_grad=True), torch.randint(50, (700,))
    targets[::3] = IGNORE
    weights = torch.rand(700) * 4 * (targets != IGNORE)
    total = cross_entropy_sum(head, hidden, targets, weights)
    wanted = (cross_entropy(plain(hidden), targets, ignore_index=IGNORE, reduction="none") * weights).sum()
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)
    for one, other in zip(*(torch.autograd.grad(t, (hidden, plain.weight)) for t in (total, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_weight_counts_like_as_many_copies_of_the_row(tmp_path: Path) -> None:
    weights = [3.0, 1.0, 1.0, 2.0, 1.0, 1.0]
    model = tiny_model().eval()
    batch = batch_of(packed(tmp_path / "a", weights))
    total, count = next_token_loss(model, batch)
    assert float(count) == batch.loss_count
    again = 0.0
    targets = 0
    for chat, weight in enumerate(weights):  # one row alone, as often as its weight says
        alone = [float(place == chat) for place in range(len(weights))]
        one, number = next_token_loss(model, batch_of(packed(tmp_path / str(chat), alone)))
        again += weight * float(one)
        targets += weight * float(number)
    assert float(total) == pytest.approx(again, rel=1e-5) and float(count) == targets


def test_micro_batches_do_not_change_what_weighted_rows_teach_and_weights_do(tmp_path: Path) -> None:
    def learned(name: str, weights: list[float], micro_batch: int) -> torch.Tensor:
        model = tiny_model(dropout=0.0)
        tiny_training(
            model,
            tmp_path / name,
            rows=packed(tmp_path / f"rows-{name}", weights),
            micro_batch=micro_batch,
            batch_tokens=5 * CONTEXT,
            budget=Budget(steps=4),
            schedule=Schedule(learning_rate=1e-2, warmup_steps=0),
            optimizer=Optimizer(gradient_clip=0.0),
            validation=None,
        )
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    weights = [0.02, 0.01, 0.05, 0.01, 0.04, 0.01, 0.03, 0.01, 0.02, 0.01] * 2  # a step counts less than one target
    whole = learned("whole", weights, 5)
    torch.testing.assert_close(learned("parts", weights, 2), whole, rtol=1e-4, atol=1e-5)
    larger = learned("larger", [100 * weight for weight in weights], 5)
    torch.testing.assert_close(larger, whole, rtol=1e-4, atol=1e-5)  # only their ratios matter
    assert not torch.allclose(learned("plain", [1.0] * 20, 5), whole, rtol=1e-3, atol=1e-4)


def test_rows_without_weights_count_once_beside_rows_that_have_some(tmp_path: Path) -> None:
    rows = mixed(packed(tmp_path / "a", [2.0] * 8), [(packed(tmp_path / "b", [1.0] * 8), 0.5)])
    batch = collate([rows.row(index) for index in range(4)], range(4))
    assert batch.weights is not None and set(batch.weights.flatten().tolist()) == {0.0, 1.0, 2.0}
    assert ((batch.weights > 0) == (batch.targets != IGNORE)).all()


def test_balanced_weights_are_those_of_scikit_learn_and_held_out_rows_have_none(tmp_path: Path) -> None:
    labels = ["heart"] * 12 + ["lung"] * 3 + ["bone"]
    wanted = dict(zip(sorted(set(labels)), compute_class_weight("balanced", classes=np.unique(labels), y=labels), strict=True))
    assert class_factors([(label, 1.0) for label in labels], "balanced") == pytest.approx(wanted)
    assert class_factors([(label, 1.0) for label in labels], {"bone": 5.0}) == {"heart": 1.0, "lung": 1.0, "bone": 5.0}
    with pytest.raises(InputError, match="expected labels of the rows, 'bone', 'heart', 'lung', got 'bones'"):
        class_factors([(label, 1.0) for label in labels], {"bones": 5.0})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {n}", "label": label}) + "\n" for n, label in enumerate(labels)))
    tokenizer = train_bpe(["row heart lung bone"], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)
    write_rows(
        tmp_path / "rows",
        [Table((file,), Template("{text}", "{label}"))],
        tokenizer=tokenizer,
        context=64,
        class_weights="balanced",
        report=lambda **_: None,
        should_stop=lambda: False,
    )
    found = batch_of(PackedRows(tmp_path / "rows", seed=0))
    assert found.weights is not None
    assert {round(one, 4) for one in found.weights.flatten().tolist()} == {0.0, *(round(float(w), 4) for w in wanted.values())}
    assert batch_of(PackedRows(tmp_path / "rows", seed=None)).weights is None

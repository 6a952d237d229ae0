"""Direct preference optimisation: loss and gradient against the paper's formula, and trainings with them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import POSITIONS, packed_pairs, tiny_model, tiny_training, with_reference
from torch import Tensor

from llm.data.batch import IGNORE, Batch, collate
from llm.data.chat_dataset import write_rows
from llm.data.chat_parts import Table
from llm.data.conversations import PreferenceTemplate
from llm.data.packing import PackedRows, has_reference
from llm.errors import InputError, Interrupted
from llm.models.decoder.model import Decoder
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe
from llm.training.config import Budget, Schedule
from llm.training.dpo import PreferenceLoss
from llm.training.loss import Learner
from llm.training.validation import Validation


def batch_of(folder: Path, rows: range | None = None) -> Batch:
    source = PackedRows(folder, seed=None)
    rows = rows or range(source.rows_per_epoch)
    return collate([source.row(index) for index in rows], rows)


def by_hand(model: Decoder, reference: Decoder, batch: Batch, *, beta: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """Sum of the paper's loss over the pairs of `batch`, each answer computed alone; and the margins."""
    losses, margins = [], []
    for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True):
        for pair in range(int(documents.max() + 1) // 2):
            gains = []
            for document in (2 * pair, 2 * pair + 1):
                here = documents == document
                wanted = targets[here]
                learned = wanted != IGNORE
                found = []
                for one in (model, reference):
                    logits = one(tokens[here][None])[0].log_softmax(-1)
                    found.append(logits[learned].gather(1, wanted[learned][:, None]).sum())
                gains.append(found[0] - found[1].detach())
            margin = beta * (gains[0] - gains[1])
            margins.append(margin)
            losses.append(-(1 - smoothing) * torch.log(torch.sigmoid(margin)) - smoothing * torch.log(torch.sigmoid(-margin)))
    return torch.stack(losses).sum(), torch.stack(margins)


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_gradient_and_rewards_are_those_of_the_formula(smoothing: float, tmp_path: Path) -> None:
    reference, model = tiny_model(), tiny_model()
    for weight in model.parameters():
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    batch = batch_of(with_reference(packed_pairs(tmp_path / "rows"), reference))
    assert batch.loss_count == 24 and len(batch.tokens) < 24  # several pairs share a row
    total, pairs, right, margin = PreferenceLoss(0.3, smoothing)(model, batch)
    total.backward()
    found = gradients(model)
    model.zero_grad()
    expected, margins = by_hand(model, reference, batch, beta=0.3, smoothing=smoothing)
    expected.backward()
    torch.testing.assert_close(total, expected)
    assert (int(pairs), int(right)) == (24, int((margins > 0).sum()))
    assert 0 < int(right) < 24
    torch.testing.assert_close(margin, margins.detach().sum(), atol=1e-4, rtol=1e-4)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_equals_its_reference_has_a_loss_of_ln_2(tmp_path: Path) -> None:
    model = tiny_model()
    total, pairs, *_ = PreferenceLoss(0.1)(model, batch_of(with_reference(packed_pairs(tmp_path / "rows"), model)))
    assert float(total / pairs) == pytest.approx(math.log(2), abs=1e-6)


def test_gradients_of_micro_batches_add_up_to_that_of_the_batch(tmp_path: Path) -> None:
    model = tiny_model()
    folder = with_reference(packed_pairs(tmp_path / "rows"), model)
    learner = Learner(tiny_model(init="scaled"), PreferenceLoss(0.1), precision="fp32")
    whole = batch_of(folder)
    found = []
    for parts in ([whole], whole.split(1)):
        learner.zero_grad()
        for part in parts:
            learner(part)[0].backward()
        found.append(gradients(learner.model))  # type: ignore[arg-type]  # the model that was passed
        assert sum(part.loss_count for part in parts) == 24
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def training(scratch: Path, rows: Path, held_out: Path, **changes: Any) -> tuple[Decoder, dict[str, Any]]:
    model = tiny_model()
    settings: dict[str, Any] = {
        "objective": PreferenceLoss(0.5),
        "rows": PackedRows(rows, seed=3),
        "validation": Validation(PackedRows(held_out, seed=None), watched=PreferenceLoss.watched),
        "budget": Budget(steps=24),
        "batch_tokens": 2 * 2 * POSITIONS,
        "schedule": Schedule(learning_rate=3e-3),
    }
    return model, tiny_training(model, scratch, **settings | changes)


def test_preferred_answers_become_likelier_and_a_resumed_training_ends_the_same(tmp_path: Path) -> None:
    base = tiny_model()
    rows, held_out = packed_pairs(tmp_path / "rows"), packed_pairs(tmp_path / "held-out", pairs=40, seed=1)
    for folder in (rows, held_out):
        with_reference(folder, base)
    whole, metrics = training(tmp_path / "whole", rows, held_out)
    assert metrics["validation_reward_accuracy"] > 0.9  # of pairs that it has not seen
    assert metrics["validation_reward_margin"] > 0.5
    assert metrics["validation_loss"] < math.log(2) - 0.1
    assert "validation_perplexity" not in metrics
    assert metrics["targets"] == pytest.approx(metrics["epochs"] * 24, rel=0.05)  # pairs are what is counted

    calls: list[None] = []

    def should_stop() -> bool:
        calls.append(None)
        return len(calls) == 10

    with pytest.raises(Interrupted):
        training(tmp_path / "halted", rows, held_out, should_stop=should_stop)
    resumed, _ = training(tmp_path / "halted", rows, held_out)
    assert all(torch.equal(weight, other) for weight, other in zip(whole.parameters(), resumed.parameters(), strict=True))
    small, _ = training(tmp_path / "small", rows, held_out, micro_batch=1)
    for weight, other in zip(whole.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=2e-4, rtol=1e-3)


# Rows of data


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(
        ["what does the heart do? it pumps blood"], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True
    )


@pytest.fixture
def pack(tmp_path: Path, tokenizer: TextTokenizer) -> Callable[..., dict[str, Any]]:
    def write(rows: list[dict[str, Any]], template: PreferenceTemplate | None = None, context: int = 32) -> dict[str, Any]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return write_rows(
            tmp_path / "rows",
            [Table((tmp_path / "rows.jsonl",), template or PreferenceTemplate())],
            tokenizer=tokenizer,
            context=context,
            report=lambda **_: None,
            should_stop=lambda: False,
        )

    return write


def test_a_pair_shares_a_row_and_only_the_answers_are_learned(
    pack: Callable[..., dict[str, Any]], tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    rows = [{"prompt": f"what {number}", "chosen": "it pumps blood", "rejected": "no"} for number in range(9)]
    statistics = pack(rows)
    assert (statistics["rows"], statistics["chats"], statistics["row_length"]) == (9, 9, 64)
    assert statistics["stream_tokens"]["max"] >= statistics["stream_tokens"]["p95"] >= statistics["stream_tokens"]["p50"]
    assert not has_reference(tmp_path / "rows")
    source = PackedRows(tmp_path / "rows", seed=None)
    seen = 0
    for index in range(source.rows_per_epoch):
        row = source.row(index)
        answers = [
            tokenizer.decode(row.targets[(row.documents == document) & (row.targets != IGNORE)].tolist())
            for document in range(row.documents.max() + 1)
        ]
        assert answers == ["it pumps blood", "no"] * (len(answers) // 2)
        seen += len(answers) // 2
    assert seen == 9


def test_a_prompt_that_is_too_long_is_cut_equally_for_both_answers(
    pack: Callable[..., dict[str, Any]], tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    statistics = pack([{"prompt": "what does the heart do? " * 20, "chosen": "it pumps blood", "rejected": "no"}])
    assert statistics["truncated"] == statistics["cut_prompts"] == 1
    row = PackedRows(tmp_path / "rows", seed=None).row(0)
    prompts = [row.tokens[(row.documents == document) & (row.targets == IGNORE)].tolist() for document in (0, 1)]
    assert prompts[0] == prompts[1] and len(prompts[0]) > 10


MESSAGES = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "blood"}]


@pytest.mark.parametrize(
    ("row", "messages", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, None, "expected different chosen and rejected answers"),
        ({"prompt": "a", "chosen": "b"}, None, "expected the field 'rejected'"),
        (
            {"c": MESSAGES, "r": [{"role": "user", "content": "who?"}, MESSAGES[1]]},
            ("c", "r"),
            "expected the same turns before",
        ),
        ({"c": [*MESSAGES, MESSAGES[0]], "r": MESSAGES}, ("c", "r"), "same turns before|expected the assistant's turn last"),
    ],
)
def test_a_row_that_is_not_a_pair_is_refused_with_its_line(
    row: dict[str, Any], messages: tuple[str, str] | None, message: str, pack: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: .*({message})"):
        pack([row], PreferenceTemplate(messages=messages))

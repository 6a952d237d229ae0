"""The kind `pretrain`: from packed tokens to a checkpoint that stock Transformers opens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from llm.data.token_shards import TokenWriter
from llm.errors import InputError, Interrupted
from llm.models.checkpoint import load_checkpoint
from llm.tokenizer.train_bpe import train_bpe
from runner.artifacts import Checkpoint
from runner.stage import Context
from runner.stages.pretrain import Pretrain

TEXTS = [f"the {organ} of a {animal} is healthy" for organ in ("heart", "liver", "lung") for animal in ("cat", "dog", "cow")]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A few sentences, as the `pack` stage leaves them."""
    tokenizer = train_bpe(TEXTS, 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)
    folder = tmp_path / "tokens"
    tokenizer.save(folder / "tokenizer")
    for split, texts in (("train", TEXTS[:8] * 5), ("validation", TEXTS[8:])):
        sizes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "context": 16, "padding": tokenizer.padding}
        with TokenWriter(folder / split, **sizes) as writer:
            for text in texts:
                writer.append(tokenizer.encode_document(text), passes=1, text_bytes=len(text.encode()))
            writer.finish()
    return folder


def stage_of(**changes: Any) -> Pretrain:
    fields = {
        "tokens": "tokens",
        "architecture": {"hidden_size": 32, "layers": 1, "heads": 2},
        "batch_tokens": 64,
        "budget": {"steps": 40},
        "schedule": {"learning_rate": 1e-2, "warmup_steps": 5},
        "seed": 3,
    }
    return Pretrain.model_validate(fields | changes)


def test_it_learns_and_leaves_a_checkpoint_that_transformers_opens(tokens: Path, make_context: Callable[..., Context]) -> None:
    context = make_context(inputs={"tokens": tokens}, cores=1)
    metrics = stage_of().run(context)
    assert metrics["validation_loss"] < 3.0  # chance is ln 300 = 5.7
    assert metrics["validation_bits_per_byte"] > 0
    assert metrics["tokens"] == 40 * 64
    made = Checkpoint(context.work)
    assert json.loads(made.config.read_text())["max_position_embeddings"] == 16  # the context of the tokens
    inputs = torch.tensor([[0, 7, 9, 12]])
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(context.work)(inputs).logits
        torch.testing.assert_close(load_checkpoint(context.work)(inputs), stock, atol=1e-5, rtol=1e-5)
    assert made.tokenizer.model.read_bytes() == (tokens / "tokenizer" / "tokenizer.json").read_bytes()
    json.dumps(metrics, allow_nan=False)


def test_interrupted_and_run_again_it_leaves_the_same_bytes(tokens: Path, make_context: Callable[..., Context]) -> None:
    whole = make_context("whole", inputs={"tokens": tokens}, cores=1)
    stage_of().run(whole)
    asked = iter([False] * 9)
    stopped = make_context("stopped", inputs={"tokens": tokens}, cores=1, should_stop=lambda: next(asked, True))
    with pytest.raises(Interrupted):
        stage_of().run(stopped)
    assert not Checkpoint(stopped.work).weights.exists()
    stage_of().run(make_context("stopped", inputs={"tokens": tokens}, cores=1))
    assert Checkpoint(stopped.work).weights.read_bytes() == Checkpoint(whole.work).weights.read_bytes()


def test_recomputing_layers_learns_the_same(tokens: Path, make_context: Callable[..., Context]) -> None:
    found = []
    for recompute in (False, True):
        context = make_context(str(recompute), inputs={"tokens": tokens}, cores=1)
        found.append(stage_of(budget={"steps": 5}, recompute=recompute).run(context)["loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_the_seed_decides_the_weights(tokens: Path, make_context: Callable[..., Context]) -> None:
    made = []
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        context = make_context(name, inputs={"tokens": tokens}, cores=1)
        stage_of(seed=seed, budget={"steps": 2}).run(context)
        made.append(Checkpoint(context.work).weights.read_bytes())
    assert made[0] == made[1] != made[2]


def test_a_context_longer_than_the_models_is_refused(tokens: Path, make_context: Callable[..., Context]) -> None:
    architecture = {"hidden_size": 32, "layers": 1, "heads": 2, "context": 8}
    with pytest.raises(InputError, match=r"architecture\.context: expected at least the 16 tokens .* got 8"):
        stage_of(architecture=architecture).run(make_context(inputs={"tokens": tokens}, cores=1))


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"architecture": {"hidden_size": 100, "layers": 1, "heads": 3}}, "hidden_size: expected a multiple of heads"),
        ({"architecture": {"name": "mamba", "hidden_size": 32, "layers": 1, "heads": 2}}, "architecture.name"),
        ({"architecture": {"hidden_size": 32, "layers": 1, "heads": 2, "width": 3}}, "architecture.width"),
        ({"budget": {"steps": 1, "epochs": 1}}, "exactly one of tokens, steps and epochs"),
        ({"schedule": {"kind": "step"}}, "schedule.kind"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_wrong_table_is_reported_before_anything_runs(wrong: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError, match=place):
        stage_of(**wrong)

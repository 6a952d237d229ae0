"""Continued pretraining: of a checkpoint on packed text, in full or by an adapter, with general text replayed beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import smollm
from safetensors.torch import load_file
from small_recipe import RECIPE, Folder
from transformers import AutoModelForCausalLM

from llm.adapters import lora
from llm.data.token_shards import TokenShards
from llm.errors import InputError, Interrupted
from llm.models.checkpoint import load_checkpoint, stored_dtype
from runner.artifacts import Checkpoint, Tokens
from runner.cache.store import Store
from runner.errors import RecipeError
from runner.graph import inputs_of
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe
from runner.stage import Context
from runner.stages.checkpoint import ImportCheckpoint, ModelFolder
from runner.stages.lora import TrainAdapter
from runner.stages.pack import Pack
from runner.stages.pretrain import Pretrain, Trunk

DOMAIN = [f"发烧和头痛是常见症状 {number}。" for number in range(40)]
GENERAL = [f"The lungs breathe air, day and night, {number}." for number in range(40)]
STEPS = {"batch_tokens": 64, "budget": {"steps": 12}, "schedule": {"learning_rate": 3e-3}, "seed": 1}


@pytest.fixture
def inputs(tmp_path: Path, make_context: Callable[..., Context]) -> dict[str, Path]:
    """A bf16 model with new tokens, and text packed with its tokenizer."""
    smollm(tmp_path / "source", vocab_size=333)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source").to(torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    imported = make_context("base")
    words = {"folder": ModelFolder("source", tmp_path), "add_tokens": ["头痛", "症状"]}
    ImportCheckpoint.model_validate(words).run(imported)
    found = {"base": imported.work}
    for name, texts in (("domain", DOMAIN), ("general", GENERAL)):
        corpus = tmp_path / f"corpus-{name}"
        corpus.mkdir()
        for split, part in (("train", texts[:-4]), ("validation", texts[-4:])):
            rows = [json.dumps({"text": text, "source": name, "passes": 1}) for text in part]
            (corpus / f"{split}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        packed = make_context(name, inputs={"corpus": corpus, "base": imported.work})
        Pack.model_validate({"corpus": "corpus", "tokenizer": "base", "context": 32}).run(packed)
        found[name] = packed.work
    return found


def stage_of(**changes: Any) -> Pretrain:
    return Pretrain.model_validate({"tokens": "domain", "base": "base"} | STEPS | changes)


def test_a_checkpoint_goes_on_learning_and_stays_what_it_is(
    inputs: dict[str, Path], make_context: Callable[..., Context]
) -> None:
    context = make_context(inputs=inputs)
    metrics = stage_of().run(context)
    first = next(line["loss"] for line in context.report.lines if "loss" in line)  # type: ignore[attr-defined]
    assert metrics["loss"] < first and "self_check" not in metrics
    base, made = Checkpoint(inputs["base"]), Checkpoint(context.work)
    assert stored_dtype(made.folder) == torch.bfloat16  # as the base
    assert made.tokenizer.model.read_bytes() == base.tokenizer.model.read_bytes()
    assert made.tokenizer.config.read_bytes() == base.tokenizer.config.read_bytes()  # its chat template
    assert json.loads(made.config.read_text()) == json.loads(base.config.read_text())
    before, after = load_file(base.weights), load_file(made.weights)
    assert before.keys() == after.keys() and not torch.equal(*(one["model.norm.weight"] for one in (before, after)))
    AutoModelForCausalLM.from_pretrained(made.folder)


def test_interrupted_and_run_again_it_leaves_the_same_bytes(
    inputs: dict[str, Path], make_context: Callable[..., Context]
) -> None:
    whole = make_context("whole", inputs=inputs)
    stage_of().run(whole)
    asked = iter([False] * 7)
    with pytest.raises(Interrupted):
        stage_of().run(make_context("cut", inputs=inputs, should_stop=lambda: next(asked, True)))
    cut = make_context("cut", inputs=inputs)
    stage_of().run(cut)
    assert Checkpoint(cut.work).weights.read_bytes() == Checkpoint(whole.work).weights.read_bytes()


def test_a_decay_from_a_trunk_of_a_checkpoint_ends_like_an_unsplit_training(
    inputs: dict[str, Path], make_context: Callable[..., Context]
) -> None:
    schedule = {"kind": "wsd", "learning_rate": 3e-3, "warmup_steps": 2, "decay_steps": 4}
    unsplit = make_context("unsplit", inputs=inputs)
    stage_of(schedule=schedule, keep_trunk=False).run(unsplit)
    split = stage_of(schedule=schedule).expanded("more", {})
    assert list(split) == ["more-trunk", "more"] and isinstance(split["more-trunk"], Trunk)
    trunk = make_context("trunk", inputs=inputs)
    split["more-trunk"].run(trunk)
    assert stored_dtype(trunk.work) == torch.float32  # nothing is rounded on the way
    decay = make_context("decay", inputs=inputs | {"more-trunk": trunk.work})
    split["more"].run(decay)
    assert Checkpoint(decay.work).weights.read_bytes() == Checkpoint(unsplit.work).weights.read_bytes()


def test_general_text_has_its_share_of_the_rows(inputs: dict[str, Path], make_context: Callable[..., Context]) -> None:
    learned: dict[str, float] = {}
    for name, mix in (("alone", None), ("replayed", [{"tokens": "general", "share": 0.5}])):
        context = make_context(name, inputs=inputs)
        stage_of(mix=mix, budget={"steps": 30}).run(context)
        model = load_checkpoint(context.work)
        ids = torch.from_numpy(TokenShards(Tokens(inputs["general"]).validation).document(0))[None]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
        learned[name] = float(losses)
    assert learned["replayed"] < learned["alone"] - 1


def test_an_adapter_and_the_embedding_learn_from_packed_text(
    inputs: dict[str, Path], make_context: Callable[..., Context]
) -> None:
    fields = {"base": "base", "tokens": "domain", "modules_to_save": ["embed_tokens"], "r": 4}
    fields["mix"] = [{"tokens": "general", "share": 0.25}]
    stage = TrainAdapter.model_validate(fields | STEPS)
    context = make_context(inputs=inputs)
    stage.prepare(context)
    metrics = stage.run(context)
    first = next(line["loss"] for line in context.report.lines if "loss" in line)  # type: ignore[attr-defined]
    assert metrics["loss"] < first and metrics["validation_loss"] > 0 and stage.holds_out
    model, plain = load_checkpoint(inputs["base"]), load_checkpoint(inputs["base"])
    lora.load_adapter(model, context.work)
    changed = (model.embedding.weight != plain.embedding.weight).any(1)
    assert changed[-2:].all()  # the rows of the new tokens


def test_tokens_of_another_tokenizer_and_rows_that_are_too_long_are_refused(
    inputs: dict[str, Path], make_context: Callable[..., Context], tmp_path: Path
) -> None:
    context = make_context(inputs=inputs)
    path = Tokens(inputs["domain"]).tokenizer.model
    path.write_text(path.read_text().replace("头痛", "头昏"))
    with pytest.raises(InputError, match=r"tokens: expected the tokenizer of 'base', got another one in 'domain'"):
        stage_of().run(context)
    with pytest.raises(InputError, match=r"mix\[0\]\.tokens: expected the tokenizer of 'tokens'"):
        stage_of(tokens="general", mix=[{"tokens": "domain", "share": 0.5}]).run(context)


def test_a_recipe_packs_text_with_the_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    smollm(folder.root / "source")
    checkpoint = '[stage.base]\nkind = "checkpoint"\nfolder = "source"\nadd_tokens_from = "words.txt"\n'
    more = '[stage.more]\nkind = "pretrain"\nbase = "base"\ntokens = "tokens"\nbatch_tokens = 64\nbudget = { steps = 3 }\n'
    text = RECIPE.replace('tokenizer = "tokenizer"', 'tokenizer = "base"') + checkpoint + more
    folder.write(text)
    words, keys = folder.root / "words.txt", set()
    for content in ("kidney\n\nliver\n", "kidney\nliver\nheart\n"):
        words.write_text(content)
        recipe = load_recipe(folder.recipe, [])
        keys.add(Plan(recipe, Store(folder.cache)).entries["base"].key)
    base = recipe.stages["base"]
    assert isinstance(base, ImportCheckpoint) and base.words() == ["kidney", "liver", "heart"]
    assert len(keys) == 2
    assert inputs_of(recipe.stages)["tokens"] == ["corpus", "base"]
    for wrong, told in (
        (text + 'architecture = { preset = "2m" }\n', "stage.more: expected either architecture or base, got both"),
        (text.replace('base = "base"\n', ""), "stage.more: architecture or base: is missing"),
        (text.replace('tokenizer = "base"', 'tokenizer = "corpus"'), "expected Tokenizer, but 'corpus' makes Corpus; these"),
    ):
        folder.write(wrong)
        with pytest.raises(RecipeError, match=told):
            load_recipe(folder.recipe, [])

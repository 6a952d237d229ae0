"""Adapters in parallel and in a row, a mix of them, general data in between, preferences: through a recipe, and by stages."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from random_model import random_model

from llm.data.batch import IGNORE
from llm.data.packing import PackedRows
from llm.data.token_shards import TokenWriter
from llm.errors import InputError
from llm.models.checkpoint import load_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe
from runner.artifacts import Checkpoint
from runner.graph import in_order, inputs_of
from runner.input_files import InputFile
from runner.recipe.recipe import load_recipe
from runner.stage import Context
from runner.stages.dpo import LearnPreferences
from runner.stages.sft import FineTune

TEXT = "the heart pumps blood and the court rules; "
RECIPE = """
name = "adapted"
[stage.base]
kind = "checkpoint"
folder = "model"
[stage.medical]
kind = "lora"
base = "base"
r = 2
budget = { steps = 4 }
batch_tokens = 64
data = [{ files = "medical.jsonl" }]
mix = [{ files = "general.jsonl", text = "text", share = 0.25 }]
[stage.legal]
kind = "lora"
base = "base"
r = 3
budget = { steps = 4 }
batch_tokens = 64
modules_to_save = ["norm"]
data = [{ files = "legal.jsonl" }]
[stage.both]
kind = "merge"
base = "base"
adapters = ["medical", "legal"]
weights = [0.7, 0.3]
[stage.onward]
kind = "lora"
base = "first"
r = 2
budget = { steps = 4 }
batch_tokens = 64
data = [{ files = "legal.jsonl" }]
[stage.first]
kind = "merge"
base = "base"
adapters = ["medical"]
[stage.chain]
kind = "merge"
base = "base"
adapters = ["medical", "onward"]
"""
WRONG = """
[stage.wrong]
kind = "merge"
base = "base"
adapters = ["medical", "legal"]
"""


def write(path: Path, rows: list[dict[str, Any]]) -> InputFile:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return InputFile(path.name, path.parent)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model, and rows beside it."""
    random_model(tmp_path / "model", [TEXT], hidden_size=32, context=32)
    write(tmp_path / "medical.jsonl", [{"prompt": f"heart {n}", "response": "pumps blood"} for n in range(12)])
    write(tmp_path / "legal.jsonl", [{"prompt": f"court {n}", "response": "rules"} for n in range(12)])
    write(tmp_path / "general.jsonl", [{"text": TEXT * 2, "license": "cc0"} for _ in range(20)])
    return tmp_path


def run_in_this_process(recipe: Path, work: Path, make_context: Callable[..., Context]) -> dict[str, Path]:
    """Folders of what the stages of a recipe make, run in order as workers do, without a process for each."""
    stages = load_recipe(recipe).stages
    made: dict[str, Path] = {}
    records: dict[str, dict[str, Any]] = {}
    for name in in_order(inputs_of(stages)):
        sources = inputs_of(stages)[name]
        context = make_context(name, inputs={source: made[source] for source in sources}, records=records)
        stages[name].prepare(context)
        metrics = stages[name].run(context)
        made[name] = context.work
        (artifact,) = stages[name].makes(context.work).digests_of([context.work / MAIN[stages[name].kind]]).values()
        inputs = {source: {"digest": records[source]["digest"]} for source in sources}
        records[name] = {"digest": artifact, "inputs": inputs, "metrics": metrics}
    return made


MAIN = {"lora": "adapter_model.safetensors", "merge": "model.safetensors", "checkpoint": "model.safetensors"}


def test_adapters_of_one_base_are_mixed_and_successive_adapters_are_merged_as_a_chain(
    folder: Path, make_context: Callable[..., Context]
) -> None:
    (folder / "recipe.toml").write_text(RECIPE)
    made = run_in_this_process(folder / "recipe.toml", folder, make_context)
    base, both, first, chain = (load_checkpoint(made[name]).state_dict() for name in ("base", "both", "first", "chain"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(both["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(both["model.norm.weight"], base["model.norm.weight"])  # legal trained it in full
    assert torch.equal(first["model.norm.weight"], base["model.norm.weight"])
    legal = (both[name] - base[name] - 0.7 * (first[name] - base[name])) / 0.3
    assert torch.linalg.matrix_rank(legal, rtol=1e-2) == 3  # what is left is the other's update
    assert torch.linalg.matrix_rank(chain[name] - first[name], rtol=1e-2) == 2

    (folder / "recipe.toml").write_text(RECIPE + WRONG)
    with pytest.raises(InputError, match=r"adapters\[1\]: .* a merge of 'medical', but 'legal' was trained on base; weights"):
        run_in_this_process(folder / "recipe.toml", folder, make_context)


@pytest.mark.long
def test_a_run_completes_a_recipe_with_chained_and_mixed_adapters(folder: Path) -> None:
    (folder / "recipe.toml").write_text(RECIPE)
    environment = os.environ | {"STOCKPOT_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "runner.cli", "run", str(folder / "recipe.toml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "cache" / "stages").glob("merge-*"))) == 3


# Mixing


def fine_tune(folder: Path, **fields: Any) -> FineTune:
    data = [{"files": InputFile("medical.jsonl", folder)}]
    return FineTune.model_validate(
        {"model": "base", "data": data, "batch_tokens": 128, "budget": {"steps": 10}, "seed": 3, **fields}
    )


def test_tokens_texts_and_chats_are_mixed_in_by_share(folder: Path, make_context: Callable[..., Context]) -> None:
    tokenizer = TextTokenizer.load(folder / "model")
    tokenizer.save(folder / "tokens" / "tokenizer")
    with TokenWriter(folder / "tokens" / "train", vocab_size=300, context=16, padding=tokenizer.padding) as writer:
        for _ in range(40):
            writer.append(tokenizer.encode_document(TEXT), passes=1, text_bytes=len(TEXT))
        writer.finish()
    context = make_context(inputs={"base": folder / "model", "tokens": folder / "tokens"})
    mix = [
        {"tokens": "tokens", "share": 0.25},
        {"files": InputFile("general.jsonl", folder), "text": "text", "share": 0.25},
        {"files": InputFile("legal.jsonl", folder), "share": 0.25},
    ]
    stage = fine_tune(folder, mix=mix, batch_tokens=32 * 4)
    stage.prepare(context)
    parts = stage.mixture(context, Checkpoint(folder / "model"))
    assert [share for _, share in parts] == [0.25] * 3
    assert {rows.context for rows, _ in parts} == {PackedRows(context.scratch / "rows", seed=None).context}
    told = [tokenizer.decode(rows.row(0).tokens[rows.row(0).targets != IGNORE].tolist()) for rows, _ in parts]
    assert "heart pumps" in told[0] and "heart pumps" in told[1] and "rules" in told[2]
    metrics = stage.run(context)
    plain = fine_tune(folder, batch_tokens=32 * 4)
    plain_context = make_context("plain", inputs={"base": folder / "model"})
    plain.prepare(plain_context)
    alone = plain.run(plain_context)
    assert [table["share"] for table in metrics["mix"]] == [0.25] * 3
    assert metrics["mix"][1]["table"]["rows"] == 20 and metrics["mix"][1]["table"]["licenses"] == {"cc0": 20}
    assert metrics["mix"][2]["table"]["rows"] == 12
    assert metrics["targets"] > 1.5 * alone["targets"]  # text is learned whole
    assert metrics["epochs"] == pytest.approx(alone["epochs"] / 4, rel=0.2)  # of the domain's own rows


def test_tokens_of_another_tokenizer_are_refused(folder: Path, make_context: Callable[..., Context]) -> None:
    other = train_bpe(["something else"], 290, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)
    other.save(folder / "tokens" / "tokenizer")
    stage = fine_tune(folder, mix=[{"tokens": "tokens", "share": 0.2}])
    with pytest.raises(InputError, match="expected 'tokens' packed with the tokenizer of the model"):
        stage.prepare(make_context(inputs={"base": folder / "model", "tokens": folder / "tokens"}))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ([{"share": 0.2}], "expected either tokens or files"),
        ([{"share": 0.2, "tokens": "t", "files": "f.jsonl"}], "expected either tokens or files, got both"),
        ([{"share": 0.2, "tokens": "t", "text": "text"}], "expected files beside text"),
        ([{"share": 0.2, "files": "f.jsonl", "text": "text", "messages": "m"}], "either text or the fields of a chat"),
        ([{"share": 0.6, "tokens": "t"}, {"share": 0.4, "tokens": "u"}], "a sum below 1, .* got 1"),
        ([{"share": 1.0, "tokens": "t"}], "less than 1"),
    ],
)
def test_an_invalid_mix_is_refused(mix: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        fine_tune(tmp_path, mix=mix)


# Preferences


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
def test_a_model_learns_to_prefer_the_preferred_answers(
    lora: dict[str, Any] | None, folder: Path, make_context: Callable[..., Context]
) -> None:
    rows = [{"prompt": f"heart {n}", "chosen": "pumps blood", "rejected": "rules the court"} for n in range(16)]
    data = [{"files": write(folder / "pairs.jsonl", rows)}]
    stage = LearnPreferences.model_validate(
        {"model": "base", "data": data, "validation": data, "lora": lora, "batch_tokens": 256, "budget": {"steps": 12}}
        | {"schedule": {"learning_rate": 5e-3}, "context": 32, "seed": 2}
    )
    context = make_context(inputs={"base": folder / "model"})
    stage.prepare(context)
    reference = (context.scratch / "rows" / "reference.bin").stat().st_mtime_ns
    stage.prepare(context)  # after a crash: what is there is kept
    assert (context.scratch / "rows" / "reference.bin").stat().st_mtime_ns == reference
    metrics = stage.run(context)
    assert metrics["validation_reward_accuracy"] == 1.0
    assert metrics["validation_reward_margin"] > 0.1
    assert metrics["validation_data"]["chats"] == 16
    before, after = load_checkpoint(folder / "model"), load_checkpoint(context.work)
    assert list(after.state_dict()) == list(before.state_dict())  # an adapter is merged
    embedded = torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert embedded == (lora is not None)
    assert (metrics["trained_parameters"] < metrics["parameters"]) == (lora is not None)


def test_an_adapter_trained_on_preferences_needs_adamw() -> None:
    fields = {"model": "base", "data": [{"files": "pairs.jsonl"}], "lora": {}, "optimizer": {"kind": "muon"}}
    with pytest.raises(ValidationError, match='expected "adamw" for an adapter'):
        LearnPreferences.model_validate(fields)


def test_biases_are_refused_because_there_are_none() -> None:
    fields = {"model": "base", "data": [{"files": "pairs.jsonl"}], "lora": {"bias": "all"}}
    with pytest.raises(ValidationError, match=r"bias\n.*Input should be .none."):
        LearnPreferences.model_validate(fields)

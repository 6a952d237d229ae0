"""The kind `parity`: what is compared, what it leaves, and that nothing is released past a difference."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_models
import pytest
import torch
from tiny_release import TEXTS, tiny_checkpoint

from llm.adapters import lora
from llm.models.checkpoint import load_checkpoint
from llm.models.decoder import gguf
from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
from runner.artifacts import Gguf, Parity
from runner.recipe.recipe import load_recipe
from runner.stage import Context, Lineage
from runner.stages.gguf import WriteGguf
from runner.stages.parity import CheckParity

WORDS = ["tokens", "chats"]

ALONE = Lineage({}, {})  # what is compared needs no other record


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of text, prompts and responses in both languages; the last is longer than the model."""
    long = {"text": "The heart. " * 90, "prompt": "The heart. " * 90, "response": "yes"}
    pairs = [{"text": text, "prompt": text[:25], "response": text[25:60]} for text in TEXTS]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*pairs, long]))
    return path


def written(checkpoint: Path, make_context: Callable[..., Context], *precisions: str) -> Path:
    context = make_context("gguf", inputs={"release": checkpoint})
    WriteGguf.model_validate({"model": "release", "precisions": list(precisions)}).run(context)
    return context.work


def parity(rows: Path, **fields: Any) -> CheckParity:
    table = {"files": str(rows)}
    return CheckParity.model_validate(
        {"model": "release", "text": [table], "prompts": [table], "max_new_tokens": 16, **fields}
    )


def test_everything_is_compared_in_transformers_and_in_every_file_for_llama_cpp(
    checkpoint: Path, rows: Path, make_context: Callable[..., Context]
) -> None:
    files = written(checkpoint, make_context, "f32", "q4_0")
    context = make_context(inputs={"release": checkpoint, "gguf": files})
    stage = parity(rows, gguf="gguf")
    metrics = stage.run(context)
    told = json.loads(Parity(context.work).results.read_text())["checks"]
    assert [check["name"] for check in told] == [
        *(f"Transformers: {what}" for what in [*WORDS, "likelihoods", "answers"]),
        *(f"llama.cpp f32: {what}" for what in [*WORDS, "likelihoods", "answers"]),
        *(f"llama.cpp q4_0: {what}" for what in [*WORDS, "likelihoods", "weights", "computation"]),
    ]
    assert all(check["passed"] and check["compared"] for check in told)
    assert metrics["prompts"] == 5  # the last was cut
    assert set(metrics["sentences"]) == {"en", "zh"}
    assert metrics["checks"][2]["measured"]["largest_difference"] < 1e-4
    (verdict,) = stage.verdicts(metrics, ALONE)
    assert verdict.passed
    assert str(verdict) == "13 comparisons equal, in Transformers, llama.cpp f32, llama.cpp q4_0"


def test_without_llama_cpp_its_files_are_reported_as_not_checked(
    checkpoint: Path, rows: Path, make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = written(checkpoint, make_context, "f32")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else found(name))
    context = make_context(inputs={"release": checkpoint, "gguf": files})
    stage = parity(rows, gguf="gguf")
    metrics = stage.run(context)
    verdict = stage.verdicts(metrics, ALONE)[-1]
    assert verdict.passed
    assert str(verdict).startswith("llama.cpp f32: not checked: it is not installed here")
    last = json.loads(Parity(context.work).results.read_text())["checks"][-1]
    assert last == {"name": "llama.cpp f32", "passed": None, "compared": 0}


@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
def test_a_fault_that_rounding_could_hide_is_found_in_the_weights(
    precision: str, checkpoint: Path, rows: Path, make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as spoilt:
        spoilt.setattr(gguf, "interleaved", lambda weight, heads: weight)
        files = written(checkpoint, make_context, precision)
    context = make_context(inputs={"release": checkpoint, "gguf": files})
    stage = parity(rows, gguf="gguf")
    failed = [str(verdict) for verdict in stage.verdicts(stage.run(context), ALONE) if not verdict.passed]
    found = [
        sentence for sentence in failed if sentence.startswith(f"llama.cpp {precision}: weights: not equal: model.layers.")
    ]
    assert len(found) == 1


def test_k_quants_want_the_tools_of_llama_cpp_and_say_so_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stage = WriteGguf.model_validate({"model": "release", "precisions": ["q8_0", "q4_k_m"]})
    (lack,) = stage.lacks()
    assert lack.startswith("precisions: expected llama-quantize for 'q4_k_m', got no such program: install llama.cpp")
    tool = tmp_path / "llama-quantize"
    tool.write_text("#!/bin/sh")
    tool.chmod(0o755)
    assert not list(stage.lacks())
    (lack,) = stage.model_copy(update={"importance": [{"files": "text.jsonl"}]}).lacks()
    assert lack.startswith("precisions: expected llama-imatrix")
    assert not list(WriteGguf.model_validate({"model": "release", "precisions": ["q4_0"]}).lacks())


@pytest.mark.long
def test_k_quants_are_made_by_the_tools_and_are_the_same_bytes_twice(
    checkpoint: Path, rows: Path, make_context: Callable[..., Context]
) -> None:
    """With `llama-quantize` and `llama-imatrix` of llama.cpp on PATH."""
    table = {"files": str(rows)}
    stage = WriteGguf.model_validate({"model": "release", "precisions": ["q4_k_m", "q6_k"], "importance": [table] * 8})
    first, second = (make_context(name, inputs={"release": checkpoint}) for name in ("first", "second"))
    facts = stage.run(first)["files"]
    assert stage.run(second)["files"] == facts
    for path in Gguf(first.work).files().values():
        assert path.read_bytes() == (second.work / path.name).read_bytes()
    assert list(facts) == ["q4_k_m", "q6_k"]
    context = make_context("parity", inputs={"release": checkpoint, "gguf": first.work})
    checks = parity(rows, gguf="gguf").run(context)["checks"]
    assert all(check["passed"] for check in checks), [check for check in checks if not check["passed"]]


def test_a_fault_in_one_file_fails_its_verdicts_alone(
    checkpoint: Path, rows: Path, make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "interleaved", lambda weight, heads: weight)
    files = written(checkpoint, make_context, "f32")
    (files / "model-BF16.gguf").write_bytes(b"GGUF" + bytes(64))
    context = make_context(inputs={"release": checkpoint, "gguf": files})
    stage = parity(rows, gguf="gguf")
    failed = [str(verdict) for verdict in stage.verdicts(stage.run(context), ALONE) if not verdict.passed]
    assert [sentence.split(": not equal: ")[0] for sentence in failed] == [
        "llama.cpp bf16",
        "llama.cpp f32: likelihoods",
        "llama.cpp f32: answers",
    ]
    assert "expected a file that llama.cpp opens" in failed[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_adapter_alone_is_compared_in_peft_on_the_stock_base(
    checkpoint: Path, rows: Path, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    model = load_checkpoint(checkpoint)
    lora.attach(model, lora.LoraConfig(r=2, alpha=4), seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    lora.save_adapter(tmp_path / "adapter", model)
    context = make_context(inputs={"release": checkpoint, "adapter": tmp_path / "adapter"})
    metrics = parity(rows, base="release", adapter="adapter").run(context)
    assert metrics["checks"][-1]["name"] == "PEFT: likelihoods"
    assert metrics["checks"][-1]["passed"]
    with pytest.raises(ValueError, match="expected base and adapter together, got adapter alone"):
        parity(rows, adapter="adapter")


def test_a_model_without_held_out_text_is_compared_on_built_in_texts(
    checkpoint: Path, make_context: Callable[..., Context]
) -> None:
    context = make_context(inputs={"release": checkpoint})
    metrics = CheckParity.model_validate({"model": "release", "max_new_tokens": 8}).run(context)
    assert metrics["sentences"] == {}
    assert [check["passed"] for check in metrics["checks"]] == [True] * 4


@pytest.mark.parametrize("family", foreign_models.FAMILIES)
def test_models_made_by_others_are_equal_everywhere(family: str, make_context: Callable[..., Context], tmp_path: Path) -> None:
    import_checkpoint(inspect_checkpoint(foreign_models.FAMILIES[family](tmp_path / "source")), tmp_path / "model")
    files = written(tmp_path / "model", make_context, "f32")
    context = make_context(inputs={"release": tmp_path / "model", "gguf": files})
    metrics = CheckParity.model_validate({"model": "release", "gguf": "gguf", "max_new_tokens": 8}).run(context)
    assert [check["told"] for check in metrics["checks"] if not check["passed"]] == []


RECIPE = """
name = "small"

[stage.base]
kind = "checkpoint"
folder = "model"

[stage.chat]
kind = "sft"
model = "base"
data = [{ files = "rows.jsonl" }]

[stage.after]
kind = "evaluate"
model = "chat"
tasks = [{ name = "answers", task = "answers", files = "rows.jsonl", prompt = "Say {prompt}" }]

[stage.gguf]
kind = "gguf"
model = "chat"

[stage.publish]
kind = "publish"
model = "chat"
gguf = "gguf"
"""


def test_a_recipe_that_publishes_gets_a_comparison_before(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(checkpoint)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    stages = load_recipe(path, allowed=[checkpoint]).stages
    made = stages["publish-parity"]
    assert isinstance(made, CheckParity)
    assert (made.model, made.gguf) == ("chat", "gguf")
    assert [table.prompt for table in made.prompts] == ["{prompt}"]  # of the training, since no evaluation is published
    assert stages["publish"].parity == "publish-parity"  # type: ignore[attr-defined]  # it is a Publish

    path.write_text(RECIPE + 'scores = ["after"]\n')
    scored = load_recipe(path, allowed=[checkpoint])
    (table,) = scored.stages["publish-parity"].prompts  # type: ignore[attr-defined]
    assert table.prompt == "Say {prompt}"
    import tomli_w

    path.write_text(tomli_w.dumps(scored.resolved()))
    assert load_recipe(path, allowed=[checkpoint]).stages == scored.stages

    path.write_text(RECIPE + '[stage.publish-parity]\nkind = "parity"\nmodel = "base"\n')
    assert load_recipe(path, allowed=[checkpoint]).stages["publish"].parity == "publish-parity-2"  # type: ignore[attr-defined]

    path.write_text(RECIPE + 'parity = "mine"\n[stage.mine]\nkind = "parity"\nmodel = "chat"\n')
    assert list(load_recipe(path, allowed=[checkpoint]).stages) == ["base", "chat", "after", "gguf", "publish", "mine"]


def test_a_difference_in_llama_cpp_stops_the_release_with_exit_code_4(tmp_path: Path) -> None:
    """Text that is not in NFC: llama.cpp does not normalize, which is known, but may not be so of much of the data."""
    tiny_checkpoint(tmp_path / "model", pre_tokenizer="gpt-2")
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "It pumps cafe\u0301."}))
    (tmp_path / "recipe.toml").write_text(
        """
        name = "small"
        [stage.base]
        kind = "checkpoint"
        folder = "model"
        [stage.gguf]
        kind = "gguf"
        model = "base"
        [stage.parity]
        kind = "parity"
        model = "base"
        gguf = "gguf"
        text = [{ files = "text.jsonl" }]
        max_new_tokens = 4
        [stage.publish]
        kind = "publish"
        model = "base"
        gguf = "gguf"
        parity = "parity"
        """
    )
    command = [sys.executable, "-m", "runner.cli", str(tmp_path / "recipe.toml"), "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    told = (
        "not equal: 11 of 13 texts; 2 others as it is known to give them (it does not bring text into Unicode's NFC), such as "
    )
    assert f"parity: llama.cpp f32: tokens: {told}" in done.stderr
    assert "skipped because of it: publish" in done.stderr
    assert not list((tmp_path / "cache" / "stages").glob("publish-*"))


def test_files_are_named_by_precision_and_the_modelfile_uses_the_smallest(
    checkpoint: Path, make_context: Callable[..., Context]
) -> None:
    made = Gguf(written(checkpoint, make_context, "f32", "bf16", "q8_0", "f16"))
    assert {precision: path.name for precision, path in made.files().items()} == {
        "f32": "model-F32.gguf",
        "f16": "model-F16.gguf",
        "bf16": "model-BF16.gguf",
        "q8_0": "model-Q8_0.gguf",
    }
    assert made.modelfile.read_text().startswith("FROM ./model-Q8_0.gguf\n")
    with pytest.raises(ValueError, match="each precision once"):
        WriteGguf.model_validate({"model": "release", "precisions": ["f32", "f32"]})

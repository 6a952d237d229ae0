"""The kind `baseline`: TF-IDF and logistic regression on the same rows as a model, and gates above it."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from llm.errors import InputError
from llm.models.checkpoint import save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.train_bpe import train_bpe
from runner.artifacts import Scores
from runner.cli import main
from runner.gates import EvaluationResult, Gate, judge
from runner.input_files import InputFile
from runner.recipe.recipe import load_recipe
from runner.stage import Context
from runner.stages.baseline import Baseline

TOPICS = {"heart": "pulse blood beat", "lung": "breath air cough", "skin": "rash itch burn"}


def rows(path: Path, count: int, seed: int) -> InputFile:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        label = draw.choice(list(TOPICS))
        words = draw.choices(TOPICS[label].split(), k=2) + draw.choices(["the", "a", "of", "some", "more"], k=5)
        if number % 10 == 0:
            words = ["the", "of", "a"]  # nothing to tell it by
        found.append({"text": " ".join(words), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return InputFile(path.name, path.parent)


def stage(tmp_path: Path, **task: Any) -> Baseline:
    form = {"prompt": "Which one?\\n{text}", "response": "{label}"}
    kinds = {"name": "kinds", "task": "classification", "files": rows(tmp_path / "test.jsonl", 60, 2), **form, **task}
    return Baseline.model_validate({"data": [{"files": rows(tmp_path / "train.jsonl", 300, 1), **form}], "tasks": [kinds]})


def test_it_scores_what_can_be_learned_from_words(tmp_path: Path, make_context: Callable[..., Context]) -> None:
    context = make_context()
    metrics = stage(tmp_path).run(context)
    values = json.loads(Scores(context.work).values.read_text())["kinds"]
    assert metrics["scores"]["kinds.accuracy"] == pytest.approx(accuracy_score(values["wanted"], values["found"]), abs=1e-5)
    f1 = f1_score(values["wanted"], values["found"], average="macro")
    assert metrics["scores"]["kinds.macro_f1"] == pytest.approx(f1, abs=1e-5)
    assert 0.85 < metrics["scores"]["kinds.accuracy"] < 1  # a tenth of the rows say nothing
    assert metrics["tasks"]["kinds"]["learned_rows"] == 300
    assert metrics == stage(tmp_path).run(make_context("again"))


def test_a_label_that_was_never_learned_is_never_chosen_and_one_label_alone_is_refused(
    tmp_path: Path, make_context: Callable[..., Context]
) -> None:
    metrics = stage(tmp_path, labels=[*TOPICS, "bone"]).run(make_context())
    assert metrics["tasks"]["kinds"]["labels"] == [*TOPICS, "bone"]
    made = stage(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "heart"}\n')
    with pytest.raises(InputError, match="at least two labels to learn from, got 1 in 1 rows"):
        made.run(make_context("one"))


def test_a_gate_compares_a_model_with_it_example_by_example(tmp_path: Path, make_context: Callable[..., Context]) -> None:
    metrics = stage(tmp_path).run(make_context())
    facts = {**metrics["tasks"]["kinds"], "precision": "fp32"}
    model = {**metrics, "scores": {**metrics["scores"], "kinds.macro_f1": 0.99}, "tasks": {"kinds": facts}}
    gate = Gate.model_validate({"score": "kinds.macro_f1", "at_least": 0.0, "above": "baseline"})
    others = {"baseline": EvaluationResult.of(metrics)}
    (verdict,) = judge([gate], EvaluationResult.of(model), others)
    assert verdict.passed and "above baseline" in verdict.found
    facts["examples"] = "other"
    (verdict,) = judge([gate], EvaluationResult.of(model), others)
    assert verdict.passed is False and "scored other rows" in verdict.because


def test_a_recipe_may_hold_an_evaluation_against_it(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", 20, 1)
    task = '{ name = "kinds", task = "classification", files = "a.jsonl", prompt = "{text}", response = "{label}" }'
    (tmp_path / "recipe.toml").write_text(
        f"""
name = "x"
[stage.model]
kind = "checkpoint"
repo = "a/b"
[stage.baseline]
kind = "baseline"
data = [{{ files = "a.jsonl", prompt = "{{text}}", response = "{{label}}" }}]
tasks = [{task}]
[stage.scores]
kind = "evaluate"
model = "model"
tasks = [{task}]
gates = [{{ score = "kinds.macro_f1", at_least = 0.0, above = "baseline" }}]
"""
    )
    assert set(load_recipe(tmp_path / "recipe.toml").stages) == {"model", "baseline", "scores"}


def test_a_model_that_ends_below_it_is_told_by_how_much_and_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count, seed in (("train", 200, 1), ("test", 60, 2)):
        rows(tmp_path / f"{name}.jsonl", count, seed)
    tokenizer = train_bpe([" ".join(TOPICS.values())], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)
    tokenizer.save(tmp_path / "model")
    torch.manual_seed(0)
    config = DecoderConfig(hidden_size=16, layers=1, heads=2, context=64)
    save_checkpoint(tmp_path / "model", Decoder(config, vocab_size=tokenizer.vocab_size), tmp_path / "model")
    task = 'name = "kinds", task = "classification", files = "test.jsonl", prompt = "{text}", response = "{label}"'
    (tmp_path / "recipe.toml").write_text(
        f"""
name = "x"
[stage.model]
kind = "checkpoint"
folder = "model"
[stage.words]
kind = "baseline"
data = [{{ files = "train.jsonl", prompt = "{{text}}", response = "{{label}}" }}]
tasks = [{{ {task} }}]
[stage.scores]
kind = "evaluate"
model = "model"
tasks = [{{ {task} }}]
gates = [{{ score = "kinds.macro_f1", at_least = 0.0, above = "words" }}]
"""
    )
    assert main([str(tmp_path / "recipe.toml"), "--cache", str(tmp_path / "cache")]) == 4
    told = capsys.readouterr().err
    found = re.search(r"scores: (\S+) below words, which knows nothing but words(.*)", told)
    assert found is not None and float(found[1]) > 0.4 and "More rows help most" in found[2]
    assert "may be chance" not in found[2], "so large a difference of 60 rows is none"

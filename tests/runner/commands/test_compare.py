"""`run compare`: fields, scores and costs of two runs, from real runs of a baseline and records by hand."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from runner.cli import main
from runner.planning.comparison import costs, differences

RECIPE = """name = "kinds"
[stage.words]
kind = "baseline"
data = [{ files = "train.jsonl", prompt = "{text}", response = "{label}" }]
tasks = [{ name = "kinds", task = "classification", files = "test.jsonl", prompt = "{text}", response = "{label}" }]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that learned from words that tell the label, and one that learned from words that hardly do."""
    folder = tmp_path_factory.mktemp("compare")
    draw = random.Random(4)
    for name, count, noise in (("train", 120, 0.0), ("noisy", 120, 0.9), ("test", 80, 0.1), ("other", 60, 0.1)):
        rows = []
        for number in range(count):
            label = draw.choice(["heart", "lung"])
            word = {"heart": "pulse", "lung": "cough"}[label if draw.random() >= noise else draw.choice(["heart", "lung"])]
            rows.append({"text": f"{word} {number % 7}", "label": label})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.toml").write_text(RECIPE.replace("train.jsonl", "noisy.jsonl"))
    (folder / "b.toml").write_text(RECIPE)
    (folder / "c.toml").write_text(RECIPE.replace("test.jsonl", "other.jsonl").replace("stage.words", "stage.tfidf"))
    for name in "abc":
        assert main([str(folder / f"{name}.toml"), "--cache", str(folder / "cache")]) == 0
    return folder


def compared(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main(["compare", *words, "--cache", str(folder / "cache"), "--json"]) in (0, 1)
    return json.loads(capsys.readouterr().out)


def test_scores_on_the_same_rows_have_the_interval_of_a_paired_bootstrap(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(folder, capsys, str(folder / "a.toml"), str(folder / "b.toml"))
    assert found["fields"] == ['stage.words.data[0].files: "noisy.jsonl" -> "train.jsonl"']
    accuracy, *_ = found["scores"]
    assert accuracy["name"] == "words: kinds.accuracy" and accuracy["rows"] == "same"
    records = [json.loads(path.read_text()) for path in (folder / "cache" / "records").glob("*.json")]
    by_score = {record["metrics"]["scores"]["kinds.accuracy"]: record for record in records}
    draws = [np.array(by_score[accuracy[s]]["metrics"]["replicates"]["kinds.accuracy"].split(), float) for s in "ab"]
    assert accuracy["interval"] == pytest.approx(np.percentile(draws[1] - draws[0], [2.5, 97.5]).tolist())
    assert accuracy["difference"] == pytest.approx(accuracy["b"] - accuracy["a"]) and accuracy["verdict"] == "better"
    (stage, whole) = found["costs"]
    assert stage["stage"] == "words" and not stage["shared"] and whole["a"]["seconds"] == stage["a"]["seconds"] > 0


def test_the_text_says_what_is_better_and_what_is_not_finished(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(folder / "a.toml"), str(folder / "b.toml"), "--cache", str(folder / "cache")]
    capsys.readouterr()
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "words: kinds.accuracy" in printed and "  better" in printed and "stage  A " in printed
    assert main([*words, "--set", "stage.words.tasks=[]"]) == 2, "B is checked like any recipe"
    assert main([*words, "--set", 'stage.words.data=[{files="test.jsonl",prompt="{text}",response="{label}"}]']) == 1
    assert "B is not finished: words" not in capsys.readouterr().out.splitlines()[0]


def test_another_evaluation_of_other_rows_is_compared_without_pairs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(folder, capsys, str(folder / "b.toml"), str(folder / "c.toml"))
    accuracy, *_ = found["scores"]
    assert accuracy["name"] == "words / tfidf: kinds.accuracy" and accuracy["rows"] == "other"
    low, high = accuracy["interval"]
    assert low < accuracy["difference"] < high and accuracy["verdict"] == "not clear"


def test_finished_stages_and_records_are_compared_and_a_missing_one_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = sorted(str(path) for path in (folder / "cache" / "stages").iterdir())
    records = sorted(str(path) for path in (folder / "cache" / "records").glob("*.json"))
    found = [compared(folder, capsys, *pair[:2]) for pair in (stages, records)]
    assert all(one["scores"][0]["a"] is not None and one["fields"] for one in found)
    assert main(["compare", str(folder / "cache"), records[0]]) == 2
    assert "expected a recipe, the folder of a finished stage, or a record" in capsys.readouterr().err


def test_losses_of_trainings_and_shared_stages() -> None:
    base = {
        "key": "k",
        "seconds": 10.0,
        "metrics": {"trained_parameters": 5, "loss": 2.0, "validation_loss": 2.5, "tokens": 9},
    }
    other = {**base, "key": "l", "seconds": 4.0, "metrics": {**base["metrics"], "validation_loss": 2.25}}
    found = {one.name: one for one in differences({"own": base}, {"own": other})}
    assert found["own: validation_loss"].change == -0.25 and found["own: validation_loss"].verdict == ""
    stage, whole = costs({"own": base}, {"own": base})
    assert stage["shared"] and stage["a"] == {"seconds": 10.0, "tokens": 9} and whole["b"] == {"seconds": 10.0}

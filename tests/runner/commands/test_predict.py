"""`run predict`: labels, answers and likelihoods for files of rows, by the tasks of a recipe and a tiny model."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from random_model import random_model

import stockpot
from llm.data.conversations import Template
from llm.evaluation.calibration import best_temperature, calibration_error, probabilities
from llm.evaluation.classification import classify, label_likelihoods
from llm.evaluation.prediction import Predictor
from llm.evaluation.scoring import Question, score_texts
from llm.inference.generate import generate
from llm.models.checkpoint import load_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer
from runner.cli import main
from runner.commands import predict as command
from runner.serving.predictions import prompt_of

RECIPE = """
name = "organs"
[stage.base]
kind = "checkpoint"
folder = "model"
[stage.scores]
kind = "evaluate"
model = "base"
tasks = [
  { name = "organ", task = "classification", files = "held_out.jsonl", prompt = "Which organ?\\n{text}", response = "{label}"
  }, { name = "said", task = "answers", files = "held_out.jsonl", prompt = "{text}", response = "{label}", max_new_tokens = 4
  }, { name = "prose", task = "text", files = "held_out.jsonl", text = "text" }, ]
"""
ORGANS = ["heart", "lung", "größe"]
ROWS = [{"id": number, "text": f"row {number} of {ORGANS[number * 7 % 3]}s"} for number in range(11)]
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose model is in its cache."""
    folder = tmp_path_factory.mktemp("organs")
    texts = [f"Which organ?\nrow {number} of {organ}s" for number in range(9) for organ in ORGANS]
    random_model(folder / "model", texts, std=0.2, hidden_size=32)
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    held_out = [{"text": f"row {number}", "label": ORGANS[number % 3]} for number in range(30)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    assert main([str(folder / "recipe.toml"), "--until", "base", "--cache", str(folder / "cache")]) == 0
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    def predict(data: Path, *options: str) -> list[dict[str, Any]]:
        out = tmp_path / "out.jsonl"
        words = ["predict", str(folder / "recipe.toml"), str(data), "--out", str(out), "--cache", str(folder / "cache")]
        assert main([*words, *options]) == 0
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    return predict


def opened(folder: Path) -> tuple[Any, TextTokenizer]:
    return load_checkpoint(folder / "model").eval(), TextTokenizer.load(folder / "model")


def test_labels_are_those_of_the_evaluation_with_calibrated_probabilities(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(folder / "new.jsonl")
    told = capsys.readouterr().err
    assert (
        "on 30 rows of the task 'organ'" in told and "on rows that did not choose it" in told and "11 rows predicted" in told
    )
    from runner.recipe.recipe import load_recipe
    from runner.serving.predictions import task_of

    task = task_of(load_recipe(folder / "recipe.toml"), None)
    assert task is not None
    model, tokenizer = opened(folder)
    turns = [prompt_of(task.template, row) for row in ROWS]  # type: ignore[arg-type]
    questions = [Question("row", [*one, one[-1]]).with_answer(ORGANS[0]) for one in turns]
    outcome = classify(model, tokenizer, questions=questions, labels=sorted(ORGANS), progress=lambda done, total: None)
    assert [row["prediction"] for row in found] == [sorted(ORGANS)[place] for place in outcome.values["found"]]
    for row, given in zip(found, ROWS, strict=True):
        assert {name: row[name] for name in given} == given, "the fields of the row are kept"
        each = {organ: row[f"probability_{organ}"] for organ in ORGANS}
        assert math.isclose(sum(each.values()), 1, abs_tol=1e-4)
        assert row["probability"] == max(each.values()) == each[row["prediction"]]


def test_a_long_row_is_predicted_from_all_its_windows(run: Run, folder: Path, tmp_path: Path) -> None:
    text = " ".join(f"row {n} of lungs and hearts" for n in range(12))
    (folder / "windows.toml").write_text(RECIPE.replace('"{label}"', '"{label}", long = "window"', 1), encoding="utf-8")
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n", encoding="utf-8"
    )
    out = tmp_path / "out.jsonl"
    words = ["predict", str(folder / "windows.toml"), str(tmp_path / "long.jsonl"), "--out", str(out)]
    assert main([*words, "--cache", str(folder / "cache")]) == 0
    row = json.loads(out.read_text(encoding="utf-8").splitlines()[0])
    model, tokenizer = opened(folder)
    turns = prompt_of(Template("Which organ?\n{text}", "{label}"), {"text": text})
    asked = Question("row", [*turns, turns[-1]]).with_answer(ORGANS[0])
    found = {
        long: label_likelihoods(model, tokenizer, [asked], sorted(ORGANS), long=long, progress=lambda done, total: None)
        for long in ("window", "cut")
    }
    assert len(found["window"][1]) > 2 and not np.allclose(found["window"][0], found["cut"][0], atol=1e-3)
    logs = np.log([row[f"probability_{organ}"] for organ in sorted(ORGANS)])
    gaps, wanted = logs - logs[0], found["window"][0][0] - found["window"][0][0][0]
    temperature = wanted[1] / gaps[1]
    assert np.allclose(gaps * temperature, wanted, atol=2e-3)  # of all windows, but for the temperature


def test_rows_with_several_labels_get_every_label_that_is_nearly_as_likely(
    run: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"row {n}", "tags": ";".join(ORGANS[: n % 3])} for n in range(24)]
    (folder / "tags.csv").write_text(
        "text,tags\n" + "".join(f"{row['text']},{row['tags']}\n" for row in rows), encoding="utf-8"
    )
    recipe = RECIPE.replace("held_out.jsonl", "tags.csv").replace("{label}", "{tags}")
    recipe = recipe.replace('response = "{tags}"', 'response = "{tags}", multi_label = ";"', 1)
    (folder / "tags.toml").write_text(recipe, encoding="utf-8")
    words = ["predict", str(folder / "tags.toml"), str(folder / "new.jsonl"), "--cache", str(folder / "cache")]
    assert main([*words, "--out", str(tmp_path / "tags.jsonl")]) == 0
    told = capsys.readouterr().err
    threshold = float(told.partition("at least ")[2].split()[0])
    assert "best on 24 rows of the task 'organ'" in told
    for line in (tmp_path / "tags.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        shares = {name: row[f"probability_{name}"] for name in [*ORGANS[:2], "none"]}
        likeliest = max(shares, key=lambda name: shares[name])
        wanted = [name for name in sorted(ORGANS[:2]) if shares[name] >= threshold * shares[likeliest] - 1e-6]
        assert row["prediction"] == ("" if likeliest == "none" else ";".join(wanted))


def test_answers_and_likelihoods_are_those_of_the_model(run: Run, folder: Path) -> None:
    model, tokenizer = opened(folder)
    answers = run(folder / "new.jsonl", "--task", "said")
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": str(row["text"])}]) for row in ROWS]
    written = generate(model, prompts, max_new_tokens=4, end=tokenizer.ends)
    assert [row["answer"] for row in answers] == [tokenizer.decode(ids) for ids in written]
    assert [row["answer_is_cut"] for row in answers] == [len(ids) == 4 for ids in written]
    same = run(folder / "new.jsonl", "--prompt", "{text}")
    assert all(row["answer"].startswith(short["answer"]) for row, short in zip(same, answers, strict=True))
    texts = [str(row["text"]) for row in ROWS]
    wanted = score_texts(model, tokenizer, texts=texts, progress=lambda done, total: None).values
    for options in (("--task", "prose"), ("--text", "text")):
        for row, nats, tokens in zip(run(folder / "new.jsonl", *options), wanted["nats"], wanted["tokens"], strict=True):
            assert math.isclose(row["log_likelihood"], -nats, rel_tol=1e-4) and row["tokens"] == tokens


def test_any_format_is_read_and_each_ending_written(folder: Path, tmp_path: Path) -> None:
    cells = [("id", "text", "prediction"), ("1", "größe; row 1", "old"), ("2", "row 2 of lungs", "older")]
    (tmp_path / "in.csv").write_bytes("\r\n".join(";".join(f'"{cell}"' for cell in row) for row in cells).encode("utf-16"))
    table = pa.table({"id": [1, 2], "text": [cells[1][1], cells[2][1]], "prediction": ["old", "older"]})
    pq.write_table(table, tmp_path / "in.parquet")
    results: list[list[dict[str, Any]]] = []
    for source, ending in (("in.csv", "csv"), ("in.parquet", "parquet"), ("in.csv", "jsonl")):
        out = tmp_path / f"out.{ending}"
        words = ["predict", str(folder / "recipe.toml"), str(tmp_path / source), "--out", str(out)]
        assert main([*words, "--cache", str(folder / "cache")]) == 0
        text = out.read_text(encoding="utf-8") if ending != "parquet" else ""
        match ending:
            case "csv":
                results.append(list(csv.DictReader(text.splitlines())))
            case "jsonl":
                results.append([json.loads(line) for line in text.splitlines()])
            case "parquet":
                results.append(pq.read_table(out).to_pylist())
        assert sorted(path.name for path in tmp_path.glob("out.*part*")) == []
    for rows in results:
        assert [row["text"] for row in rows] == ["größe; row 1", "row 2 of lungs"]
        assert [row["prediction"] for row in rows] == ["old", "older"], "a field of the row is not overwritten"
        assert [row["predicted_prediction"] for row in rows] == [row["predicted_prediction"] for row in results[0]]
        for row, first in zip(rows, results[0], strict=True):
            assert math.isclose(float(row["probability"]), float(first["probability"]), rel_tol=1e-4)


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(folder / "new.jsonl")
    monkeypatch.setattr(command, "TOGETHER", 4)
    scored: list[int] = []
    plain = Predictor.label_scores

    def counted(self: Predictor, prompts: Sequence[Any], labels: Sequence[str], **more: Any) -> Any:
        if len(scored) == 3:  # calibration, and two batches
            raise KeyboardInterrupt
        scored.append(len(prompts))
        return plain(self, prompts, labels, **more)

    monkeypatch.setattr(Predictor, "label_scores", counted)
    with pytest.raises(KeyboardInterrupt):
        command.main(parsed(folder, tmp_path))
    part = tmp_path / "out.jsonl.part"
    assert len(part.read_text(encoding="utf-8").splitlines()) == 1 + 8
    with part.open("a", encoding="utf-8") as file:
        file.write('{"id": 8, "te')  # torn by a power cut
    scored.clear()
    assert run(folder / "new.jsonl") == whole
    assert scored == [30, 3] and "8 rows were done before" in capsys.readouterr().err


def parsed(folder: Path, tmp_path: Path) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_options(parser)
    out = str(tmp_path / "out.jsonl")
    words = [str(folder / "recipe.toml"), str(folder / "new.jsonl"), "--out", out, "--cache", str(folder / "cache")]
    return parser.parse_args(words)


def test_a_row_that_cannot_be_used_has_an_error_and_the_others_their_predictions(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    lines = ['{"text": "row 1"}', '{"text": null}', "not JSON", '{"text": "  "}', '{"text": "row 2"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = run(tmp_path / "rows.jsonl", "--prompt", "{text}")
    assert [("answer" in row, "error" in row) for row in found] == [(True, False), *[(False, True)] * 3, (True, False)]
    assert "expected text or a number in 'text', got null" in found[1]["error"]
    assert "rows.jsonl:3: expected one JSON object per line" in found[2]["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "organs"], "--task: expected organ, prose, said, got 'organs'; did you mean 'organ'"),
        (["--task", "organ", "--text", "text"], "--text: expected one of --task, --prompt and --text, got also --task"),
        (["--prompt", "{body}"], "expected the field 'body'"),
        (["--out", "rows.txt"], "expected a file named *.csv, *.jsonl, *.parquet, got 'rows.txt'"),
    ],
)
def test_what_cannot_be_predicted_is_told(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(folder / "recipe.toml"), str(folder / "new.jsonl"), "--cache", str(folder / "cache")]
    assert main([*words, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_temperature_mends_scores_that_are_too_sure_and_changes_no_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    fair = torch.randn(4000, 5, generator=generator).double() * 1.5
    expected = torch.multinomial(fair.softmax(1), 1, generator=generator)[:, 0].tolist()
    scores = (fair * 3.0).numpy()  # three times too sure
    temperature = best_temperature(scores, expected)
    assert 2.7 < temperature < 3.3
    before, after = (calibration_error(probabilities(scores, one), expected) for one in (1.0, temperature))
    assert after < 0.03 < 0.2 < before
    assert (probabilities(scores, temperature).argmax(1) == scores.argmax(1)).all()


def test_python_gets_the_same_predictions_and_answers(run: Run, folder: Path) -> None:
    recipe = stockpot.load(folder / "recipe.toml", cache=folder / "cache")
    assert recipe.predict(folder / "new.jsonl") == run(folder / "new.jsonl")
    assert recipe.predict(folder / "new.jsonl", text="text")[0].keys() == run(folder / "new.jsonl", "--text", "text")[0].keys()
    model, tokenizer = opened(folder)
    (ids,) = generate(
        model, [tokenizer.encode_prompt([{"role": "user", "content": "row 3"}])], max_new_tokens=4, end=tokenizer.ends
    )
    assert recipe.chat("row 3", max_new_tokens=4) == tokenizer.decode(ids)

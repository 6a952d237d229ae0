"""The kind `evaluate`: from files of rows to scores.json, and what a recipe can say wrong."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from random_model import random_model
from small_recipe import Folder

from llm.errors import InputError, Interrupted
from runner.stage import Context, Lineage, Parallel
from runner.stages.evaluate import Evaluate

ALONE = Lineage({}, {})
ROWS = [
    {"text": "The heart pumps blood.", "label": "organ"},
    {"text": "A fever is a sign of an infection.", "label": "symptom"},
    {"text": "The liver is red.", "label": "organ"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("checkpoint"), [row["text"] for row in ROWS], 290, seed=1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    return path


def stage(*tasks: dict[str, Any], **fields: Any) -> Evaluate:
    return Evaluate.model_validate({"model": "base", "tasks": list(tasks), **fields})


def classification(rows: Path, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": "Which? {text}", "response": "{label}"}
    return {"name": "section", "task": "classification", "files": str(rows), **prompt, **fields}


def text(rows: Path, **fields: Any) -> dict[str, Any]:
    return {"name": "general", "task": "text", "files": str(rows), **fields}


def answers(rows: Path, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": "{label}?", "response": "{text}", "max_new_tokens": 4}
    return {"name": "answers", "task": "answers", "files": str(rows), **prompt, **fields}


def run(evaluation: Evaluate, context: Context) -> dict[str, Any]:
    evaluation.run(context)
    scores: dict[str, Any] = json.loads((context.work / "scores.json").read_text())
    return scores


def test_scores_are_flat_names_in_order_with_counts(
    rows: Path, checkpoint: Path, make_context: Callable[..., Context]
) -> None:
    context = make_context(inputs={"base": checkpoint})
    found = run(stage(text(rows), classification(rows), answers(rows, limit=2)), context)
    assert list(found["scores"]) == [
        "answers.bits_per_byte",
        "answers.bleu",
        "answers.chrf",
        "answers.length_ratio",
        "answers.perplexity",
        "answers.repetition",
        "general.bits_per_byte",
        "general.perplexity",
        "section.accuracy",
        "section.ece",
        "section.macro_f1",
    ]
    assert found["counts"] == {"answers": 2, "general": 3, "section": 3}
    errors = [json.loads(line) for line in (context.work / "errors.jsonl").read_text().splitlines()]
    wrong = [error for error in errors if error["task"] == "section"]
    assert len(wrong) == round(3 * (1 - found["scores"]["section.accuracy"]))
    assert sum(error["task"] == "answers" for error in errors) == 2


def test_the_same_evaluation_writes_the_same_bytes(rows: Path, checkpoint: Path, make_context: Callable[..., Context]) -> None:
    contexts = [make_context(name, inputs={"base": checkpoint}) for name in ("first", "second")]
    for context in contexts:
        stage(text(rows), classification(rows), answers(rows)).run(context)
    for name in ("scores.json", "errors.jsonl"):
        first, second = ((context.work / name).read_bytes() for context in contexts)
        assert first == second


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_of_the_scores_is_in_the_record(
    rows: Path, checkpoint: Path, make_context: Callable[..., Context], precision: str
) -> None:
    tasks = [text(rows), classification(rows), answers(rows), answers(rows) | {"task": "compare", "against": "base"}]
    tasks[-1]["name"] = "compared"
    parallel = Parallel.model_validate({"precision": precision})
    metrics = stage(*tasks).run(make_context(inputs={"base": checkpoint}, parallel=parallel))
    assert {facts["precision"] for facts in metrics["tasks"].values()} == {precision}
    assert metrics["scores"]["compared.bits_per_byte_change"] == 0.0  # both models in the same precision


RECIPE = """
name = "shared"
[stage.base]
kind = "checkpoint"
folder = "base"
[stage.scores]
kind = "evaluate"
model = "base"
tasks = [
  { name = "section", task = "classification", files = "rows.jsonl.gz", prompt = "Which? {text}", response = "{label}" },
  { name = "general", task = "text", files = "rows.jsonl.gz" },
  { name = "answers", task = "answers", files = "rows.jsonl.gz", prompt = "{label}?", response = "{text}", max_new_tokens = 4
  }, ]
"""


def test_two_processes_score_to_the_same_bytes_as_one(
    rows: Path, checkpoint: Path, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    folder.write(RECIPE)
    shutil.copytree(checkpoint, tmp_path / "base")
    done = folder.run("--processes", "2", "--set", "parallel.precision=fp32")
    assert done.returncode == 0, done.stderr
    shared = folder.artifact("scores")
    record = json.loads((shared / "record.json").read_text())
    assert record["processes"] == 2
    assert record["metrics"]["tasks"]["answers"]["new_tokens"] > 0
    alone = make_context(inputs={"base": checkpoint}, parallel=Parallel(precision="fp32"))
    stage(classification(rows), text(rows), answers(rows)).run(alone)
    for name in ("scores.json", "errors.jsonl", "values.json"):
        assert (shared / name).read_bytes() == (alone.work / name).read_bytes(), name


def test_speeds_are_in_the_record_but_not_in_the_scores(
    rows: Path, checkpoint: Path, make_context: Callable[..., Context]
) -> None:
    context = make_context(inputs={"base": checkpoint})
    metrics = stage(answers(rows)).run(context)
    assert metrics["tasks"]["answers"]["prompt_tokens_per_second"] > 0
    assert metrics["tasks"]["answers"]["new_tokens_per_second"] > 0
    assert "second" not in (context.work / "scores.json").read_text()


def test_an_interrupted_evaluation_continues_after_the_tasks_it_has_scored(
    rows: Path, checkpoint: Path, make_context: Callable[..., Context]
) -> None:
    seen: list[str] = []

    def report(**values: Any) -> None:
        seen.append(values["unit"])

    evaluation = stage(text(rows), classification(rows))
    stopping = make_context(inputs={"base": checkpoint}, report=report, should_stop=lambda: "rows of section" in seen)
    with pytest.raises(Interrupted):
        evaluation.run(stopping)
    seen.clear()
    found = run(evaluation, make_context(inputs={"base": checkpoint}, report=report))
    assert set(seen) == {"rows of section"}
    assert found == run(evaluation, make_context("fresh", inputs={"base": checkpoint}))


def test_a_limit_selects_rows_from_the_whole_file(
    rows: Path, checkpoint: Path, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"Text {number}.", "label": "x"}) + "\n" for number in range(10)))
    context = make_context(inputs={"base": checkpoint})
    assert run(stage(answers(path, limit=3)), context)["counts"] == {"answers": 3}
    wanted = [json.loads(line)["wanted"] for line in (context.work / "errors.jsonl").read_text().splitlines()]
    assert wanted == ["Text 0.", "Text 3.", "Text 6."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"rows.jsonl:2: expected one JSON object per line"),
        ('{"text": "no label here"}', r"rows.jsonl:2: .*'label'"),
        ('{"text": "x", "label": "lung"}', r"rows.jsonl:2: expected one of the labels 'organ', 'symptom', got 'lung'"),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error_with_file_and_line(
    line: str, message: str, checkpoint: Path, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    with pytest.raises(InputError, match=message):
        stage(classification(path, labels=["organ", "symptom"])).run(make_context(inputs={"base": checkpoint}))


def test_bad_rows_are_counted_and_skipped_if_the_recipe_says_so(
    checkpoint: Path, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    bad = ["not json", '{"text": "no label"}']
    lines = [json.dumps(ROWS[0]), *bad, '{"text": "x <|end|>", "label": "organ"}', json.dumps(ROWS[1])]
    path.write_text("\n".join(lines) + "\n")
    context = make_context(inputs={"base": checkpoint})
    metrics = stage(classification(path, on_bad_row="skip")).run(context)
    assert metrics["tasks"]["section"]["skipped_rows"] == 2
    assert metrics["tasks"]["section"]["rows"] == 3  # a special token in a text is text


def test_a_chat_without_an_answer_at_its_end_is_a_bad_row(
    checkpoint: Path, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    chats = [["user", "assistant"], ["user", "assistant", "user"], ["user", "assistant", "user", "assistant"]]
    rows = [{"my-chat": [{"role": role, "content": f"{role} says"} for role in roles]} for roles in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "chat", "task": "answers", "files": str(path), "messages": "my-chat", "max_new_tokens": 0}
    with pytest.raises(InputError, match=r"rows.jsonl:2: expected the assistant's turn last, .* got the user's"):
        stage(task).run(make_context("fail", inputs={"base": checkpoint}))
    metrics = stage(task | {"on_bad_row": "skip"}).run(make_context("skip", inputs={"base": checkpoint}))
    assert (metrics["tasks"]["chat"]["rows"], metrics["tasks"]["chat"]["skipped_rows"]) == (2, 1)


def test_half_a_character_is_a_bad_row(checkpoint: Path, make_context: Callable[..., Context], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a \ud83d"}) + "\n" + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(InputError, match=r"rows.jsonl:1: .*half of a surrogate pair"):
        stage(text(path)).run(make_context("fail", inputs={"base": checkpoint}))
    metrics = stage(text(path, on_bad_row="skip")).run(make_context("skip", inputs={"base": checkpoint}))
    assert (metrics["tasks"]["general"]["rows"], metrics["tasks"]["general"]["skipped_rows"]) == (1, 1)


def test_text_is_the_name_of_a_field_or_a_template(rows: Path, checkpoint: Path, make_context: Callable[..., Context]) -> None:
    tasks = [text(rows), text(rows, name="braces", text="{text}"), text(rows, name="label", text="label")]
    scores = stage(*tasks).run(make_context(inputs={"base": checkpoint}))["scores"]
    assert scores["general.perplexity"] == scores["braces.perplexity"] != scores["label.perplexity"]


def test_a_task_may_have_the_name_of_a_file_of_the_run(
    rows: Path, checkpoint: Path, make_context: Callable[..., Context]
) -> None:
    context = make_context(inputs={"base": checkpoint})
    (context.scratch / "job.json").write_text("{}")
    assert stage(text(rows, name="job")).run(context)["tasks"]["job"]["rows"] == 3


def test_files_without_a_row_are_an_error(checkpoint: Path, make_context: Callable[..., Context], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(InputError, match="expected rows for the task 'general', got none"):
        stage(text(path)).run(make_context(inputs={"base": checkpoint}))


def test_gates_are_judged_from_the_scores_in_the_record(rows: Path) -> None:
    metrics = {"scores": {"section.macro_f1": 0.8, "section.accuracy": 1.0}}
    gates = [{"score": "section.macro_f1", "at_least": 0.9}, {"score": "section.accuracy", "at_least": 0.9}]
    assert [verdict.passed for verdict in stage(classification(rows), gates=gates).verdicts(metrics, ALONE)] == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": [{"score": "general.perplexityy", "at_most": 3.0}]}, "did you mean 'general.perplexity'"),
        ({"gates": [{"score": "general.perplexity"}]}, "exactly one of at_least and at_most"),
        ({"tasks": []}, "at least 1 item"),
    ],
)
def test_a_wrong_evaluation_is_refused_before_it_runs(change: dict[str, Any], message: str, rows: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        Evaluate.model_validate({"model": "base", "tasks": [text(rows)], **change})


def test_two_tasks_with_the_same_name_are_refused(rows: Path) -> None:
    with pytest.raises(ValidationError, match="a different name for each task, got 'general' twice"):
        stage(text(rows), text(rows))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 2.0}, "Extra inputs"),
        ({"labels": ["organ", "symptom", "organ"]}, "expected labels that differ, got 'organ' twice"),
        ({"labels": ["organ"]}, "at least 2 items"),
        ({"response": "label"}, "'label': expected the name of a field in braces"),
    ],
)
def test_a_wrong_task_is_refused(fields: dict[str, Any], message: str, rows: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(classification(rows, **fields))


def test_a_gate_on_chrf_needs_generated_answers(rows: Path) -> None:
    gates = [{"score": "answers.chrf", "at_least": 20.0}]
    stage(answers(rows), gates=gates)
    with pytest.raises(ValidationError, match=r"'answers.chrf'"):
        stage(answers(rows, max_new_tokens=0), gates=gates)

"""The report on a recipe: what stands in it, made from the records of a small cache."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from small_cache import FILES

from runner.artifacts import SCRATCH
from runner.cache.store import Store
from runner.input_files import InputFile
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe
from runner.reporting.graph_drawing import as_text
from runner.reporting.report import RunReport, as_html, as_markdown
from runner.reporting.score_meanings import MEANINGS
from runner.stage import Ref
from runner.stages.fields.eval_tasks.multiple_choice import MultipleChoiceTask
from runner.stages.fields.eval_tasks.questions import AnswersTask, ClassificationTask, ComparisonTask, TextTask

RECIPE = """
name = "attempts"
[stage.base]
kind = "checkpoint"
folder = "model"
[stage.medical]
kind = "lora"
base = "base"
data = [{ files = "rows.jsonl" }]
attempts = [{ r = 8 }, { data = [{ files = "other.jsonl" }] }, { r = 2 }]
[stage.release]
kind = "merge"
base = "base"
adapters = ["medical"]
[stage.after]
kind = "evaluate"
model = "release"
tasks = [{ name = "general", task = "text", files = "rows.jsonl" }]
gates = [{ score = "general.bits_per_byte", at_most = 2.0 }]
[stage.gguf]
kind = "gguf"
model = "release"
"""
TABLE = {"rows": 9, "bad": 1, "dropped": 0, "learned_tokens": 10}
METRICS: dict[str, Any] = {
    "lora": {"tokens": 100, "steps": 10, "data": {"tables": [TABLE]}},
    "evaluate": {"tasks": {"general": {"rows": 1, "examples": "same"}}},
}
BITS = {"after@1": 2.5, "after@2": 1.5}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """The second of three attempts has passed."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    for name in ("rows", "other"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "a", "response": "{name}", "text": "c"}}\n', encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    recipe, store = load_recipe(tmp_path / "recipe.toml"), Store(tmp_path / "cache")
    while entry := (found := Plan(recipe, store)).next():
        work = store.work(entry.stage, str(entry.key))
        (work / SCRATCH).mkdir(parents=True)
        for file in FILES[entry.stage.makes]:
            (work / file).write_text("" if file == "errors.jsonl" else str(entry.key), encoding="utf-8")
        metrics = dict(METRICS.get(entry.stage.kind, {}))
        if entry.stage.kind == "evaluate":
            metrics["scores"] = {"general.bits_per_byte": BITS[entry.name], "general.own": 1.0}
        facts = {"identity": entry.identity, "metrics": metrics, "finished": "2026-01-01T00:00:00+00:00", "seconds": 1.0}
        inputs = {source: found.record(source).summary() for source in found.inputs(entry.name)}
        store.finish(entry.stage, str(entry.key), {**facts, "inputs": inputs})
    return found


@pytest.fixture
def report(plan: Plan) -> RunReport:
    return RunReport(plan.recipe, plan, now=datetime.datetime(2026, 1, 1))


def test_the_data_of_each_attempt_is_told(report: RunReport) -> None:
    (data,) = [table for table in report.tables if table.title == "Data"]
    assert [list(row[:3]) for row in data.rows] == [
        ["medical@1", "rows.jsonl", "8"],
        ["medical@2", "other.jsonl", "8"],
    ]


def test_a_score_has_its_meaning_beside_it_where_it_is_known(report: RunReport) -> None:
    assert report.scores is not None
    assert report.scores.head == ["score", "after@1", "after@2", "meaning"]
    meanings = {row[0]: row[-1] for row in report.scores.rows}
    assert "lower is better" in meanings["general.bits_per_byte"] and meanings["general.own"] == ""
    assert meanings["general.bits_per_byte"] in as_html(report) and meanings["general.bits_per_byte"] in as_markdown(report)


def test_every_score_of_a_task_has_a_meaning() -> None:
    file: Any = {"name": "a", "files": InputFile("rows.jsonl", Path())}
    tasks = [
        TextTask(task="text", **file),
        ClassificationTask(task="classification", **file),
        ClassificationTask(task="classification", multi_label=",", **file),
        MultipleChoiceTask(task="multiple_choice", **file, answer="answer"),
        AnswersTask(task="answers", **file),
        ComparisonTask(task="compare", against=Ref("base"), **file),
    ]
    assert {name for task in tasks for name in task.metrics} == set(MEANINGS)


def test_in_a_drawing_as_text_a_stage_stands_under_one_that_it_reads(plan: Plan) -> None:
    lines = as_text(plan).splitlines()
    under: list[str] = []  # names, by indentation
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        name, reads = line.split()[1], line.partition("<- ")[2]
        under = [*under[:depth], name]
        assert depth == 0 or under[depth - 1] in reads.split(", ")
    assert len(lines) == len(plan.entries)
    place = [line.split()[1] for line in lines]
    assert place.index("gguf") < place.index("medical@3"), "a skipped attempt stands between the model and what is made of it"

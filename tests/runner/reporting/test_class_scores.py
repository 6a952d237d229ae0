"""Scores by class in the report and on the card, from a run of a baseline."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from runner.hub.class_scores import class_scores
from runner.hub.model_card import Model, model_card
from runner.reporting.confusion_matrix import confusion_svg

TASK = 'name = "kinds", task = "classification", files = "{}.jsonl", prompt = "{{text}}", response = "{{label}}"'
RECIPE = f"""name = "kinds"
[stage.words]
kind = "baseline"
data = [{{ files = "train.jsonl", prompt = "{{text}}", response = "{{label}}" }}]
tasks = [{{ {TASK.format("test")} }}]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    rows = [{"text": f"{word} {n}", "label": label} for n in range(6) for word, label in (("pulse", "a<b"), ("cough", "l|ng"))]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = {"text": "pulse and pulse", "label": "l|ng"}
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:4], wrong]))
    (folder / "recipe.toml").write_text(RECIPE)
    assert run(folder, "recipe.toml").returncode == 0
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner.cli", *words, "--cache", "cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_report_has_scores_by_class_the_confusion_matrix_and_the_surest_mistakes(finished: Path) -> None:
    done = run(finished, "report", "recipe.toml", "--out", "report.html")
    assert done.returncode == 0, done.stderr
    page = (finished / "report.html").read_text()
    assert "By class: words: kinds" in page and ">a&lt;b</td>" in page and "% sure)" in page
    (picture,) = re.findall(r'<svg[^>]*class="confusion".*?</svg>', page, re.DOTALL)
    drawing = ElementTree.fromstring(picture)
    assert [one.text for one in drawing.iter() if one.tag.endswith("text") and one.text and one.text.isdigit()] == [
        "2",
        "1",
        "2",
    ]
    assert run(finished, "report", "recipe.toml", "--out", "report.md").returncode == 0
    text = (finished / "report.md").read_text()
    assert "| a<b | 0.6667 | 1 | 0.8 | 2 |" in text and "| l\\|ng | 1 | 2 |" in text


def test_the_card_has_scores_by_class_and_who_is_taken_for_whom(finished: Path) -> None:
    (path,) = (finished / "cache" / "records").glob("*.json")
    record = json.loads(path.read_text())
    recipe = {"name": "kinds", "stage": {"words": {"kind": "baseline", "tasks": []}}}
    card = model_card(Model(recipe, {"words": record}, {"words": record["metrics"]["scores"]}, "mit", ["en"], "1"))
    assert "| a&lt;b | 0.6667 | 1 | 0.8 | 2 |" in card
    assert "| expected | a&lt;b | l\\|ng |" in card and "| l\\|ng | 1 | 2 |" in card


def test_of_many_labels_the_worst_are_listed_and_no_matrix_is_drawn() -> None:
    classes = [{"label": str(n), "precision": 1.0, "recall": 1.0, "f1": n / 100, "support": 1} for n in range(80)]
    (found,) = class_scores({"tasks": {"kinds": {"labels": [str(n) for n in range(80)], "classes": classes}}})
    assert len(found.classes) == 51 and found.classes[1][0] == "0" and found.classes[50][0] == "49"
    assert found.confusion_table == []
    assert "&lt;script&gt;" in confusion_svg(["<script>", "b"], [[1, 0], [0, 1]])

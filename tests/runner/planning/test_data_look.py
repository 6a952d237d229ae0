"""The look at data before anything runs: what would fail at a later stage is told at once, with counts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_recipe import RECIPE, Folder

from runner.cache.store import Store
from runner.cli import main
from runner.errors import RecipeError
from runner.planning.data_look import check_data
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe

TAUGHT = (
    RECIPE
    + """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { preset = "2m" }
[stage.chat]
kind = "sft"
model = "base"
data = [{ files = "rows.*", prompt = "{question}", response = "{answer}", on_bad_row = "BAD" }]
"""
)
SCORED = """
[stage.scores]
kind = "evaluate"
model = "chat"
tasks = [
  { name = "kinds", task = "classification", files = "test.csv", prompt = "{text}", response = "{label}",
    labels = ["a", "b"] },
  { name = "one", task = "classification", files = "one.csv", prompt = "{text}", response = "{label}" },
  { name = "exam", task = "multiple_choice", files = "exam.jsonl" },
]
"""


@pytest.fixture
def look(tmp_path: Path) -> Callable[[str], tuple[list[str], list[str]]]:
    """Looks at the data of a recipe beside a small corpus: the faults, and what is left out as the recipe asks."""
    Folder(tmp_path).documents(["some text"] * 5)

    def look(recipe: str) -> tuple[list[str], list[str]]:
        (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
        notes: list[str] = []
        try:
            check_data(Plan(load_recipe(tmp_path / "recipe.toml"), Store(tmp_path / "cache")), notes.append)
        except RecipeError as error:
            return str(error).splitlines(), notes
        return [], notes

    return look


Look = Callable[[str], tuple[list[str], list[str]]]


@pytest.mark.parametrize(
    ("name", "content"), [("rows.jsonl", '{"queston": 1, "answer": 2}\n'), ("rows.csv", "queston,answer\n1,2\n")]
)
def test_a_field_missing_in_the_first_row_is_reported_before_anything_runs(
    look: Look, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    ((told,), _) = look(TAUGHT.replace("BAD", "fail"))
    assert f"stage.chat.data[0]: expected the field 'question' in the rows of {tmp_path / name}, got only 'queston'" in told
    assert told.endswith("did you mean 'queston'?")
    assert look(TAUGHT.replace("BAD", "fail").replace("{question}", "{queston}")) == ([], [])


def test_rows_that_cannot_be_used_are_counted_and_the_first_of_each_cause_is_named(look: Look, tmp_path: Path) -> None:
    rows = [{"question": "" if n in range(35, 72) else f"why {n}", "answer": f"because {n}"} for n in range(920)]
    rows[100]["answer"] = None  # type: ignore[assignment]
    rows[200] = {"answer": "because"}
    text = "".join(json.dumps(row) + "\n" for row in rows).replace('"because 300"', "NaN").replace('"because 400"', '["x"]')
    (tmp_path / "rows.jsonl").write_text(text)
    found, notes = look(TAUGHT.replace("BAD", "fail"))
    assert notes == [] and len(found) == 4
    place = f"{tmp_path / 'recipe.toml'}: stage.chat.data[0]: "
    assert found[0] == (
        f'{place}37 of 920 rows cannot be used; on_bad_row = "skip" leaves them out. First {tmp_path}/rows.jsonl:36: the '
        "prompt: expected text, got only white space"
    )
    assert [line.partition("rows.jsonl:")[2].partition(":")[0] for line in found] == ["36", "101", "201", "301"]
    assert "2 of 920 rows" in found[1]  # null and a list: the same cause
    found, notes = look(TAUGHT.replace("BAD", "skip"))
    assert found == [] and len(notes) == 4
    assert notes[0].startswith("stage.chat.data[0]: 37 of 920 rows cannot be used and are left out. First ")


def test_everything_that_is_wrong_in_any_stage_is_told_at_once(look: Look, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('question,answer\nwhy,because\n"x"y,z\n', encoding="utf-8")
    (tmp_path / "test.csv").write_text("text,label\nfine,a\nwrong,c\n", encoding="utf-8")
    (tmp_path / "one.csv").write_text("text,label\nfine,a\nfine too,a\n", encoding="utf-8")
    (tmp_path / "exam.jsonl").write_text('{"question": "?", "choices": ["a", "b"], "answer": "E"}\n')
    (tmp_path / "text.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    found, _ = look(TAUGHT.replace("BAD", "fail") + SCORED)
    assert [line.partition(": stage.")[2].partition(":")[0] for line in found] == [
        "corpus.sources[0]",
        "chat.data[0]",
        "scores.tasks[0]",
        "scores.tasks[1]",
        "scores.tasks[2]",
    ]
    assert "expected one of the labels a, b, got 'c'" in found[2]
    assert "expected rows of at least two distinct labels" in found[3]
    assert "expected the text or letter of one of 2 choices" in found[4]


def test_a_part_without_rows_is_a_fault(look: Look, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\nwhy,because\nwho,me\n")
    recipe = TAUGHT.replace("BAD", "fail").replace('on_bad_row = "fail"', 'split = { part = "test" }')
    ((told,), _) = look(recipe)
    assert "stage.chat.data[0]: split: expected rows in the part 'test', got none of 2" in told
    assert look(recipe.replace('"test"', '"train"')) == ([], [])


@pytest.mark.parametrize("skip", ["fail", "skip"])
@pytest.mark.parametrize(("name", "content"), [("rows.jsonl", b"no JSON\n"), ("rows.jsonl", b""), ("rows.parquet", b"PAR1")])
def test_files_of_which_no_row_can_be_used_are_faults_even_where_rows_may_be_left_out(
    look: Look, tmp_path: Path, name: str, content: bytes, skip: str
) -> None:
    (tmp_path / name).write_bytes(content)
    ((told,), _) = look(TAUGHT.replace("BAD", skip))
    assert name in told or "got none in 0 rows" in told


def test_stages_that_are_finished_are_not_looked_at(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder.root / "text.jsonl").read_text()
    (folder.root / "text.jsonl").write_text(text + '{"text": null}\n')
    assert main(["plan", str(folder.recipe), "--cache", str(folder.cache)]) == 2
    assert "stage.corpus.sources[0]: 1 of 197 rows cannot be used" in capsys.readouterr().err
    done = folder.run()
    assert done.returncode == 2 and "1 of 197 rows cannot be used" in done.stderr
    (folder.root / "text.jsonl").write_text(text)
    assert folder.run().returncode == 0

"""`run new`: people's own files, in any form, become a recipe that runs without an edit."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from messy_data import MESSY, SENTENCES
from workbooks import write_xlsx

from runner.cache.store import Store
from runner.cli import main
from runner.planning.data_look import check_data
from runner.planning.plan import Plan
from runner.recipe.new_recipe import OTHER_SECONDS, Answers, Rows, recipe_text
from runner.recipe.recipe import Recipe, load_recipe
from runner.recipe.training_work import training_work

LABELS = Rows("a.jsonl", "labels", "{text}", "{label}", "text", "label", labels=("x", "y"), count=900, characters=80)
PAIRS = Rows("a.jsonl", "pairs", "{text}", "{label}", "text", count=900, characters=80, long_characters=900, bad=3)
CHATS = Rows("a.jsonl", "chats", messages="messages", count=15, characters=500)
PREFERENCES = Rows("a.jsonl", "preferences", "{prompt}", text="prompt", count=50_000, characters=500)
DOCUMENTS = Rows("a.jsonl", "documents", "text", text="text", count=100, characters=5000, read={"encoding": "gb18030"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("{}\n")
    for name in ("general_en-1", "general_zh", "general_en_val", "general_zh_val", "chat_en", "chat_zh"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("rows", "hardware", "minutes"),
    list(itertools.product((None, LABELS, PAIRS, CHATS, PREFERENCES, DOCUMENTS), ("cpu", "gpu"), (0.1, 10_000.0))),
)
@pytest.mark.parametrize("language", ["en", "zh", "both", "de"])
@pytest.mark.parametrize("base", [None, "owner/name"])
def test_every_answer_makes_a_recipe_that_validates(
    folder: Path, rows: Rows | None, hardware: Any, minutes: float, language: str, base: str | None
) -> None:
    if rows is None and base is not None:
        return
    answers = Answers("mine", language, rows, hardware, minutes, "me/mine" if base else None, base, None if base else ".")
    (folder / "mine.toml").write_text(recipe_text(answers), encoding="utf-8")
    recipe = load_recipe(folder / "mine.toml")
    assert ("corpus" in recipe.stages) == (base is None or rows is DOCUMENTS)
    assert ("baseline" in recipe.stages) == (rows is LABELS)
    assert ("publish" in recipe.stages) == (base is not None)
    assert recipe.stages["scores"].model_dump()["tasks"]


def test_more_time_makes_a_larger_model_and_fewer_rows_more_epochs(folder: Path) -> None:
    def made(minutes: float, rows: Rows) -> tuple[int, int]:
        answers = Answers("mine", "en", rows, "cpu", minutes, shipped=".")
        (folder / "mine.toml").write_text(recipe_text(answers), encoding="utf-8")
        stages = load_recipe(folder / "mine.toml").resolved()["stage"]
        return stages["base"]["architecture"]["hidden_size"], stages["own"]["budget"]["epochs"]

    few = Rows(**{**vars(LABELS), "count": 100})
    assert made(0.1, LABELS)[0] < made(10, LABELS)[0] < made(300, LABELS)[0] < made(10_000, LABELS)[0]
    assert made(10, few)[1] > made(10, LABELS)[1]


def test_the_time_that_is_asked_for_is_what_the_recipe_takes_at_the_speed_that_was_measured(folder: Path) -> None:
    def seconds(minutes: float, speed: float, rows: Rows) -> float:
        answers = Answers("mine", "en", rows, "cpu", minutes, shipped=".", speed=speed)
        (folder / "mine.toml").write_text(recipe_text(answers), encoding="utf-8")
        stages = load_recipe(folder / "mine.toml").resolved()["stage"]
        shape, own = stages["base"]["architecture"], stages.get("own", {"batch_tokens": 1024})
        layers, size = shape["layers"], shape["hidden_size"]
        parameters = 12 * layers * size**2 + stages["tokenizer"]["vocab_size"] * size
        tuned = own["budget"].get("tokens") or own["budget"]["epochs"] * 0.8 * rows.count * (rows.characters / 3.5 + 8)
        work = 0.0
        for tokens, batch in (
            (stages["base"]["budget"]["tokens"], stages["base"]["batch_tokens"]),
            (tuned, own["batch_tokens"]),
        ):
            work += training_work(6 * parameters * tokens, tokens, steps=tokens / batch, gpu=False)
        return work / speed

    for speed, minutes, rows in itertools.product((3e10, 1.6e11, 1e12), (10, 15, 60), (LABELS, PAIRS)):
        asked = 60 * minutes - min(0.25 * 60 * minutes, OTHER_SECONDS)
        assert seconds(minutes, speed, rows) == pytest.approx(asked, rel=0.25), (speed, minutes, rows.kind)


def test_few_rows_are_learned_often_in_small_steps(folder: Path) -> None:
    few = Rows(**{**vars(LABELS), "count": 40, "characters": 40, "is_unequal": True})
    (folder / "mine.toml").write_text(recipe_text(Answers("mine", "en", few, "cpu", 0.01, shipped=".")), encoding="utf-8")
    own = load_recipe(folder / "mine.toml").resolved()["stage"]["own"]
    assert own["batch_tokens"] == 256 and own["class_weights"] == "balanced"
    assert own["budget"]["epochs"] * 0.8 * 40 * (40 / 3.5 + 8) / 256 >= 100  # steps
    many = Rows(**{**vars(LABELS), "count": 10_000})
    (folder / "mine.toml").write_text(recipe_text(Answers("mine", "en", many, "cpu", 600, shipped=".")), encoding="utf-8")
    assert load_recipe(folder / "mine.toml").resolved()["stage"]["own"]["batch_tokens"] == 8192


def test_rows_with_several_labels_become_a_recipe_for_them(tmp_path: Path) -> None:
    rows = "".join(f'"{text}",{";".join(["a", "b", "c"][: n % 4])}\n' for n, text in enumerate(SENTENCES))
    (tmp_path / "a.csv").write_text("text,topics\n" + rows)
    recipe = new(tmp_path / "mine", tmp_path / "a.csv", "--label", "topics", "--separator", ";")
    stages = recipe.resolved()["stage"]
    assert stages["own"]["data"][0]["multi_label"] == ";" and "stratify" not in stages["own"]["data"][0]["split"]
    assert stages["baseline"]["tasks"][0]["multi_label"] == ";" and "labels" not in stages["scores"]["tasks"][0]
    assert (
        look(recipe, tmp_path / "cache") == []
        and "on_bad_row" not in (tmp_path / "mine.toml").read_text().partition("[stage.own]")[2]
    )


def new(path: Path, data: Path, *words: str) -> Recipe:
    assert main(["new", str(path), "--data", str(data), "--minutes", "0.1", "--yes", *words]) == 0
    return load_recipe(path.with_suffix(".toml"), allowed=[data.parent])


def look(recipe: Recipe, cache: Path) -> list[str]:
    """What is left out; RecipeError for what cannot be used."""
    notes: list[str] = []
    check_data(Plan(recipe, Store(cache)), notes.append)
    return notes


@pytest.mark.parametrize("name", MESSY)
def test_a_messy_file_becomes_a_recipe_whose_data_can_be_used(tmp_path: Path, name: str) -> None:
    file, content, kind = MESSY[name]
    (tmp_path / file).write_bytes(content)
    recipe = new(tmp_path / "mine", tmp_path / file)
    if name in ("Alpaca", "ShareGPT", "messages", "preferences with the prompt inside"):  # known by their fields
        assert (
            " prompt = " not in (tmp_path / "mine.toml").read_text().partition("[stage.own]")[2].partition("[stage.scores]")[0]
        )
    assert {"labels": "baseline", "preferences": "preferred"}.get(kind, "scores") in recipe.stages
    task = recipe.resolved()["stage"]["scores"]["tasks"][0]
    assert task["task"] == {"labels": "classification", "documents": "text"}.get(kind, "answers")
    if name == "a log":  # one document, of which nothing can be held out
        assert "split =" not in (tmp_path / "mine.toml").read_text() and task["name"] == "general-en"
    notes = look(recipe, tmp_path / "cache")
    assert bool(notes) == (name in ("40% empty cells", "broken lines", "numbers of 5,000 digits"))
    assert not [path for path in tmp_path.iterdir() if "draft" in path.name]


def test_a_workbook_and_a_folder_of_notes_become_recipes(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "a.xlsx", {"Rows": [["comment", "class"], *([text, n % 2] for n, text in enumerate(SENTENCES))]})
    recipe = new(tmp_path / "sheet", tmp_path / "a.xlsx")
    assert recipe.resolved()["stage"]["scores"]["tasks"][0]["labels"] == ["0", "1"]
    (tmp_path / "notes" / "old").mkdir(parents=True)
    for number, text in enumerate(SENTENCES):
        (tmp_path / "notes" / ("old" if number % 2 else "") / f"{number}.md").write_text(f"# Note\n\n{text}\n")
    recipe = new(tmp_path / "notes-model", tmp_path / "notes")
    assert recipe.resolved()["stage"]["scores"]["tasks"][0]["task"] == "text"
    assert look(recipe, tmp_path / "cache") == []


def test_every_choice_is_an_option_and_a_file_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("a,b,c\n" + "".join(f"some longer text {n},{n % 2},other {n}\n" for n in range(30)))
    words = ["--text", "c", "--label", "b", "--kind", "labels", "--language", "de", "--hardware", "gpu", "--repo", "me/mine"]
    stages = new(tmp_path / "mine.toml", tmp_path / "a.csv", *words).resolved()["stage"]
    assert stages["own"]["data"][0] | {"prompt": "{c}", "response": "{b}"} == stages["own"]["data"][0]
    assert stages["corpus"]["sources"][0]["language"] == "de" and stages["publish"]["repo"] == "me/mine"
    assert main(["new", str(tmp_path / "mine"), "--yes"]) == 2
    assert "expected the name of a new file, but it exists" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "mine.toml"), "--cache", str(tmp_path / "cache")]) == 0


def test_the_language_is_guessed_from_the_rows_and_every_guess_is_told_as_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    german = ["Die Lieferung war schnell, und alles war heil.", "Nach zwei Tagen war das Geschenk meiner Mutter kaputt."]
    lines = [f"{german[number % 2]} {number};{('gut', 'schlecht')[number % 2]}" for number in range(30)]
    (tmp_path / "a.csv").write_text("\n".join(["Bewertung Text;Urteil", *lines]), encoding="utf-8")
    recipe = new(tmp_path / "mine.toml", tmp_path / "a.csv", "--minutes", "4")
    assert recipe.resolved()["stage"]["corpus"]["sources"][0]["language"] == "de"
    told = capsys.readouterr().err
    assert "--text 'Bewertung Text' --label Urteil --language de" in told and "--minutes" not in told


def test_data_elsewhere_is_allowed_in_the_commands_that_are_shown(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path_factory.mktemp("二 rows") / "rows.csv"
    rows.write_text("question,answer\n" + "".join(f"why {n},because {n}\n" for n in range(9)), encoding="utf-8")
    new(tmp_path / "deeper" / "mine", rows)
    assert f"--allow-path '{rows.parent}'" in capsys.readouterr().out
    assert rows.name in (tmp_path / "deeper" / "mine.toml").read_text(encoding="utf-8")
    assert (tmp_path / "deeper" / "stockpot-data" / "NOTICE").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.jsonl"], "expected a file"),
        (["--minutes", "-1"], "more than 0"),
        (["--repo", "a/b/c"], "owner/name"),
        (["--data", "a.csv", "--text", "c"], "expected one of the fields 'a', 'b', got 'c'"),
        (["--data", "empty.csv"], "expected rows that can be used, got none"),
        (["--data", "a.csv", "--text", "a", "--label", "b"], "expected at least 3 rows, to test on one of them, got 1"),
        (["--language", "English"], "expected a code of two or three letters"),
        (["--base", "a/b/c"], "expected nothing, owner/name"),
    ],
)
def test_a_wrong_answer_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\nsome text,1\n")
    (tmp_path / "empty.csv").write_text("a,b\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(["new", "mine.toml", "--yes", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_questions_are_asked_again_after_a_fault_and_answers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{text},{n % 2}\n" for n, text in enumerate(SENTENCES)))
    said: Callable[[list[str]], None] = lambda answers: monkeypatch.setattr("builtins.input", lambda _: answers.pop(0))  # noqa: E731
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    said([str(tmp_path / "a.csv"), "labls", "labels", "", "", "en", "", "cpu", "1", ""])
    assert main(["new", str(tmp_path / "mine")]) == 0
    told = capsys.readouterr()
    assert "expected one of labels, pairs" in told.out and "text: number 0 of the reviews" in told.err

    def stop(_: str) -> str:
        raise KeyboardInterrupt

    answers = [str(tmp_path / "a.csv"), "labels"]
    monkeypatch.setattr("builtins.input", lambda question: answers.pop(0) if answers else stop(question))
    assert main(["new", str(tmp_path / "other")]) == 130
    assert (
        f"your answers so far: run new {tmp_path / 'other'} --data {tmp_path / 'a.csv'} --kind labels"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "other.toml").exists()

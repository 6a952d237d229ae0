"""`run new`: the recipe validates and plans for every combination of answers."""

import itertools
import shutil
from pathlib import Path

import pytest

from runner.cli import main
from runner.recipe.new_recipe import Answers, recipe_text
from runner.recipe.recipe import load_recipe

SHIPPED = Path(__file__).parents[3] / "recipes"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of recipes with the shipped data beside them."""
    shutil.copytree(SHIPPED / "data", tmp_path / "data", copy_function=lambda source, target: Path(target).hardlink_to(source))
    return tmp_path


@pytest.mark.parametrize(
    ("language", "hardware", "minutes"), list(itertools.product(("en", "zh", "both"), ("cpu", "gpu"), (0.5, 10.0, 10_000.0)))
)
def test_every_answer_makes_a_recipe_that_validates(folder: Path, language: str, hardware: str, minutes: float) -> None:
    data = "data/section_train.jsonl.gz" if language != "zh" else None
    answers = Answers("mine", language, data, ("text", "label"), hardware, minutes, "me/mine" if data else None)  # type: ignore[arg-type]
    (folder / "mine.toml").write_text(recipe_text(answers), encoding="utf-8")
    recipe = load_recipe(folder / "mine.toml")
    assert ("domain" in recipe.stages) == (data is not None)
    assert recipe.stages["publish"].model_dump()["model"] == ("release" if data else "chat")


def test_more_time_makes_a_larger_model(folder: Path) -> None:
    def hidden_size(minutes: float) -> int:
        (folder / "mine.toml").write_text(recipe_text(Answers("mine", "en", None, (), "cpu", minutes, None)), encoding="utf-8")
        return int(load_recipe(folder / "mine.toml").stages["base"].model_dump()["architecture"]["hidden_size"])

    assert hidden_size(10) < hidden_size(300) < hidden_size(10_000)


def test_flags_answer_for_scripts_and_the_recipe_plans(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "mine.toml"
    words = ["--language", "en", "--data", str(folder / "data/section_train.jsonl.gz"), "--minutes", "5", "--repo", "me/mine"]
    assert main(["new", str(path), *words]) == 0
    text = path.read_text(encoding="utf-8")
    assert 'prompt = "{text}", response = "{label}"' in text and 'repo = "me/mine"' in text
    assert "--allow-path" not in capsys.readouterr().out
    assert main(["plan", str(path), "--cache", str(folder / "cache")]) == 0
    assert main(["new", str(path), *words]) == 2
    assert "expected the name of a new file, but it exists" in capsys.readouterr().err


def test_data_elsewhere_is_allowed_in_the_commands_that_are_shown(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path_factory.mktemp("二 rows") / "rows.csv"
    rows.write_text("question,answer\nwhy,because\n", encoding="utf-8")
    assert main(["new", str(folder / "mine"), "--data", str(rows)]) == 0
    assert f"--allow-path '{rows.parent}'" in capsys.readouterr().out
    assert 'prompt = "{question}", response = "{answer}"' in (folder / "mine.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--data", "none.jsonl"], "expected a file"), (["--minutes", "-1"], "more than 0"), (["--repo", "a/b/c"], "owner/name")],
)
def test_a_wrong_answer_is_an_error(folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(folder / "mine.toml"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "mine.toml").exists()

"""The commands that only read: compare, graph, list."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

import pytest

from runner.cli import main
from runner.commands.list import header
from runner.options import recipe_path

SHIPPED = Path(__file__).parents[3] / "recipes"
QUICKSTART = SHIPPED / "quickstart.toml"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(("word", "meant"), [("plann", "'plan'"), ("quick-start", "'quickstart'"), ("zzz", None)])
def test_a_word_that_is_neither_a_command_nor_a_recipe_is_an_error(
    word: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word, str(QUICKSTART)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"run {word}: no such command or recipe; expected a path, a command (bench, ")
    assert error.endswith(f"; did you mean {meant}?\n" if meant else "smollm-medical)\n")


def test_run_alone_names_the_first_commands_and_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  run {command} " in printed for command in ("RECIPE", "plan", "new", "chat", "report"))
    assert "\n  quickstart  " in printed


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(["--version"]), capsys.readouterr().out) == (0, f"stockpot {version('stockpot')}\n")


def test_windows_is_told_of_wsl() -> None:
    code = "import os; os.name = 'nt'; import runner"  # all that the check reads
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "use WSL" in done.stderr.splitlines()[-1]


def test_a_recipe_is_found_by_its_name_here_then_in_recipes_then_among_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path("quickstart") == QUICKSTART
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.toml").touch()
    assert recipe_path("quickstart") == Path("recipes/quickstart.toml")
    (tmp_path / "quickstart.toml").touch()
    assert recipe_path("quickstart") == Path("quickstart.toml")
    (tmp_path / "quickstart").touch()
    assert recipe_path("quickstart") == Path("quickstart"), "a file of that name comes first"
    assert recipe_path("~/mine.toml") == Path.home() / "mine.toml"
    assert main(["plan", "medical-lor"]) == 2
    assert "medical-lor: no such recipe; " in (error := capsys.readouterr().err)
    assert error.endswith("did you mean 'medical-lora'?\n")


def test_an_override_that_begins_with_a_stage_is_told_the_whole_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(QUICKSTART), "--set", "medical.r=4"]) == 2
    assert capsys.readouterr().err == (
        "--set medical.r=4: medical is a stage, expected stage.medical; did you mean --set stage.medical.r=4?\n"
    )


def test_a_path_in_a_recipe_may_begin_at_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("words", encoding="utf-8")
    recipe = tmp_path / "work" / "recipe.toml"
    recipe.parent.mkdir()
    recipe.write_text('name = "x"\n[stage.a]\nkind = "corpus"\nsources = [{ files = "~/text.txt" }]\n', encoding="utf-8")
    assert main(["plan", str(recipe), "--allow-path", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 0
    assert main(["plan", str(recipe), "--cache", str(tmp_path / "cache")]) == 2, "it is a folder like any other"
    assert str(tmp_path / "text.txt") in capsys.readouterr().err


def test_a_recipe_may_be_called_by_any_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe").write_text('name = "x"\n[stage.a]\nkind = "no"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["recipe"]) == 2
    assert "stage.a.kind" in capsys.readouterr().err


def test_a_recipe_does_not_differ_from_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(QUICKSTART), str(QUICKSTART)]) == 0
    assert capsys.readouterr().out == ""


def test_a_difference_is_shown_by_its_dotted_name_with_both_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(QUICKSTART), str(QUICKSTART), "--set", "stage.medical.r=5"]) == 1
    assert capsys.readouterr().out == "stage.medical.r: 8 -> 5\n"


def test_a_default_that_is_written_out_is_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(QUICKSTART), str(QUICKSTART), "--set", "stage.medical.rslora=false"]) == 0


@pytest.mark.parametrize("form", ["text", "mermaid", "svg"])
def test_a_drawing_has_every_stage_and_every_arrow(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", str(QUICKSTART), "--form", form, "--cache", str(tmp_path)]) == 0
    drawn = capsys.readouterr().out
    for name in (
        "corpus",
        "tokenizer",
        "tokens",
        "base-trunk",
        "base",
        "chat",
        "medical",
        "release",
        "before",
        "after",
        "gguf",
        "parity",
        "publish",
    ):
        assert name in drawn
    if form == "text":
        assert "medical (lora, waiting)  <- chat\n" in drawn
        assert "publish (publish, waiting)  <- release, before, after, gguf, parity" in drawn
    if form == "mermaid":
        assert drawn.count("-->") == 20
    if form == "svg":
        picture = ElementTree.fromstring(drawn)
        boxes = [(group.get("transform"), len(group.findall(f"{SVG}rect"))) for group in picture.iter(f"{SVG}g")][1:]
        assert len(boxes) == 13 and len({place for place, _ in boxes}) == 13, "no box lies on another"
        assert len([path for path in picture.iter(f"{SVG}path") if path.get("marker-end")]) == 20


def test_the_list_shows_hardware_time_and_result_of_every_shipped_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    for path in SHIPPED.glob("*.toml"):
        assert path.name in output
        assert set(header(path.read_text(encoding="utf-8"))) == {"Hardware", "Time", "Result"}, path.name


def test_a_missing_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path / "none")]) == 2
    assert "expected a folder of recipes" in capsys.readouterr().err

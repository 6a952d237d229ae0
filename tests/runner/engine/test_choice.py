"""Which engine a run uses, and what its user's file may say."""

from pathlib import Path

import pytest
from small_recipe import RECIPE, Folder

from runner.cli import main
from runner.engine.choice import VARIABLE, chosen_kind, engine_of
from runner.engine.settings import Settings, read_settings, settings_file
from runner.errors import RecipeError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, which is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    settings_file().parent.mkdir(parents=True)
    return settings_file()


def test_the_command_line_decides_then_the_environment_then_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_kind(None, read_settings()) == ("local", "the default")
    file.write_text('kind = "slurm"\n[slurm]\npartition = "big"\ncpus = 8\ngres = "gpu:4"')
    assert chosen_kind(None, read_settings()) == ("slurm", str(file))
    monkeypatch.setenv(VARIABLE, "local")
    assert chosen_kind(None, read_settings()) == ("local", VARIABLE)
    assert chosen_kind("slurm", read_settings()) == ("slurm", "--engine")
    for option in ("flyte", "LOCAL"):
        with pytest.raises(RecipeError, match="--engine: expected one of local, slurm, got"):
            chosen_kind(option, Settings())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('kind = "dask"', "kind: "),
        ("[slurm]\ncpus = 0", "slurm.cpus: "),
        ("[slurm]\nnodes = 2", "slurm.nodes: "),
        ("[slurm]\noptions = '--mem=1G'", "slurm.options: "),
        ("kind = ", "expected a TOML file"),
        ("\x00", "expected a TOML file"),
    ],
)
def test_a_wrong_file_is_named_with_its_field(file: Path, text: str, fault: str) -> None:
    file.write_text(text)
    with pytest.raises(RecipeError, match=f"engine.toml: {fault}"):
        read_settings()


def test_this_machine_alone_refuses_several_nodes(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path / "here")
    assert main(["run", str(folder.recipe), "--nodes", "2", "--cache", str(folder.cache)]) == 2
    assert "parallel.nodes: expected 1 on this machine alone, got 2; --engine slurm" in capsys.readouterr().err
    assert engine_of(None, nodes=1).kind == "local"


def test_a_recipe_cannot_name_an_engine(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path / "here")
    for before, after in (('engine = "slurm"', ""), ("", '[parallel]\nengine = "slurm"'), ("", '[slurm]\naccount = "theirs"')):
        folder.write(f"{before}\n{RECIPE}\n{after}")
        assert main(["plan", str(folder.recipe), "--cache", str(folder.cache)]) == 2
        assert "is not known here" in capsys.readouterr().err


def test_the_command_engine_shows_this_machine(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine"]) == 0
    said = capsys.readouterr().out
    assert "engine local (by the default)" in said and "this machine" in said

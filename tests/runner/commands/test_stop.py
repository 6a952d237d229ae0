"""`run --detach` goes on by itself, and `run stop` ends it like Ctrl-C."""

import time
from pathlib import Path

import pytest
from small_recipe import ALL_CACHED, Folder

from runner.cache.running import noted, running

TRAINED = """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 32, layers = 1, heads = 2 }
budget = { steps = 100_000 }
batch_tokens = 64
schedule = { kind = "constant" }
"""


def test_a_note_names_the_recipe_only_while_its_process_lives(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    assert running(tmp_path, recipe) == []
    with noted(tmp_path, recipe):
        (pid,) = running(tmp_path, recipe)
        assert running(tmp_path, tmp_path / "other.toml") == []
        (note,) = (tmp_path / "runs").glob("*.pid")
        text = note.read_text()
    assert running(tmp_path, recipe) == [] and not note.exists()
    note.write_text(text.replace('"began": ', '"began": 1'))  # another process with this number
    assert running(tmp_path, recipe) == [] and not note.exists()
    note.write_text("{")
    assert running(tmp_path, recipe) == []
    assert pid > 0


@pytest.mark.long  # the import of torch alone takes seconds
def test_a_run_in_the_background_is_stopped_and_continues(folder: Folder) -> None:
    folder.write(folder.recipe.read_text() + TRAINED)
    began = folder.run("--detach")
    assert began.returncode == 0 and "runs in the background as process" in began.stderr
    log = folder.cache / "runs" / "small.log"
    end = time.monotonic() + 120
    while "step" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
    stopped = folder.call("stop", str(folder.recipe))
    assert stopped.returncode == 0, stopped.stderr
    assert "ended; the same `run` continues from there" in stopped.stderr
    assert folder.states()["base"] == "resume" and folder.call("stop", str(folder.recipe)).returncode == 1
    assert {name: state for name, state in folder.states().items() if name != "base"} == ALL_CACHED


def test_faults_are_told_before_a_run_goes_to_the_background(folder: Folder) -> None:
    with (folder.root / "text.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    done = folder.run("--detach")
    assert done.returncode == 2 and "1 of 197 rows cannot be used" in done.stderr
    assert not (folder.cache / "runs" / "small.log").exists()

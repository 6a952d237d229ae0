"""The cache in unusual places: read-only folders, full disks, clocks that jump, names in any script, moved folders."""

import ctypes
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_cache import flip
from small_recipe import ALL_CACHED, RECIPE, Folder

from runner.cache.run_log import FOLDER
from runner.cli import main

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


def as_anybody() -> None:
    """Drops root's capability to write read-only files."""
    if os.geteuid() == 0:
        ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def limited_to(size: int) -> Callable[[], None]:
    """Limits every file to `size` bytes: writing more fails as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def call(folder: Folder, verb: str, *words: str, first: Callable[[], None] = as_anybody) -> subprocess.CompletedProcess[str]:
    command = folder.command(verb, *words, "--cache", str(folder.cache))
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=first)


def set_writable(root: Path, writable: bool) -> None:
    bits = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    for path in [root, *root.rglob("*")]:
        mode = path.stat().st_mode
        path.chmod(mode | stat.S_IWUSR if writable else mode & ~bits)


def moved(folder: Folder, root: Path) -> Folder:
    root.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder.root, root)
    return Folder(root)


@pytest.fixture
def read_only(folder: Folder) -> Iterator[Folder]:
    set_writable(folder.cache, False)
    yield folder
    set_writable(folder.cache, True)


def test_a_read_only_cache_serves_its_artifacts(read_only: Folder) -> None:
    before = {path: path.stat().st_mtime_ns for path in read_only.cache.rglob("*")}
    recipe = str(read_only.recipe)
    for words in (["run", recipe], ["plan", recipe], ["why", recipe, "tokens"], ["path", recipe, "tokens"], ["verify"]):
        done = call(read_only, *words)
        assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in read_only.cache.rglob("*")} == before


def test_a_read_only_cache_is_reported_when_a_stage_has_to_run(read_only: Folder) -> None:
    done = call(read_only, "run", str(read_only.recipe), "--set", "stage.tokens.context=16")
    assert done.returncode == 3
    assert f"{read_only.cache}: the cache cannot be written (Permission denied), and a stage has to run" in done.stderr
    assert "--cache or STOCKPOT_CACHE" in done.stderr
    assert "Traceback" not in done.stderr


def test_damage_in_a_read_only_cache_is_reported_and_left(read_only: Folder) -> None:
    (damaged,) = read_only.cache.glob("stages/tokenizer-*/tokenizer.json")
    damaged.chmod(0o644)
    flip(damaged, 100)
    done = call(read_only, "verify")
    assert done.returncode == 3
    assert "tokenizer.json: expected sha256" in done.stderr and "cannot be written" in done.stderr
    assert damaged.exists()


@pytest.mark.parametrize("size", [0, 500, 3_000, 12_000])
def test_a_full_disk_is_reported_and_finished_work_is_kept(finished: Folder, tmp_path: Path, size: int) -> None:
    folder = Folder(tmp_path / "full")
    done = call(folder, "run", str(folder.recipe), first=limited_to(size))
    assert done.returncode == 3
    assert "File too large" in done.stderr and "free some space and run again" in done.stderr
    assert "Traceback" not in done.stderr
    before = {path.name for path in (folder.cache / "stages").glob("*-*")}
    done = folder.run()
    assert done.returncode == 0, done.stderr
    assert before <= {path.name for path in (folder.cache / "stages").iterdir()}
    assert [folder.digest(stage) for stage in ALL_CACHED] == [finished.digest(stage) for stage in ALL_CACHED]
    assert main(["verify", "--cache", str(folder.cache)]) == 0


@pytest.mark.parametrize("year", [1970, 2100])
def test_a_clock_that_jumps_reruns_nothing_and_loses_nothing(folder: Folder, year: int) -> None:
    """The times of files and of the run log are from another year, as after a clock was corrected."""
    seconds = (year - 1970) * 365 * 24 * 3600 + 1
    for path in folder.root.rglob("*"):
        os.utime(path, (seconds, seconds))
    for note in (folder.cache / FOLDER).iterdir():
        note.write_text(json.dumps({**json.loads(note.read_text()), "time": float(seconds)}))
    assert folder.states() == ALL_CACHED
    assert folder.run().returncode == 0
    assert folder.run("--set", "stage.tokens.context=16").returncode == 0
    assert main(["verify", "--cache", str(folder.cache)]) == 0
    assert main(["gc", "--cache", str(folder.cache)]) == 0
    assert folder.states() == ALL_CACHED
    assert len(list((folder.cache / "stages").iterdir())) == 4


def test_names_of_every_kind_run_resume_and_verify(tmp_path: Path) -> None:
    """One path with text of any script, spaces, quotes, and characters that are special to shells, globs, templates and
    URLs."""
    folder = Folder(
        tmp_path / "数据 集" / "with space and 'quote\" $x" / "-dash" / "--set" / "a[1]*?" / "{b}" / "percent%20" / "#hash"
    )
    (folder.root / "text.jsonl").rename(folder.root / "文 本[1].jsonl")
    folder.write(RECIPE.replace("text.jsonl", "文 本[1].jsonl"))
    folder.recipe = folder.recipe.rename(folder.root / "配方 一.toml")
    folder.cache = folder.root / "缓存 *"
    done = folder.run()
    assert done.returncode == 0, done.stderr
    assert folder.states() == ALL_CACHED
    assert folder.artifact("tokens").is_dir()
    assert main(["verify", "--cache", str(folder.cache)]) == 0
    assert main(["gc", str(folder.recipe), "--cache", str(folder.cache)]) == 0


def test_a_folder_with_a_name_that_is_not_utf8_plans_and_fails_without_a_traceback(tmp_path: Path) -> None:
    """Libraries that read and write artifacts need UTF-8 names. (macOS has no others.)"""
    name = b"latin-\xe9" if sys.platform == "linux" else "数据".encode()
    folder = Folder(tmp_path / os.fsdecode(name))
    for verb, codes in (("plan", {0}), ("run", {0, 3}), ("verify", {0})):
        command = [*folder.command(verb, str(folder.recipe)), "--cache", str(folder.cache)]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode in codes, done.stderr
        assert b"Traceback" not in done.stderr


def test_an_ascii_terminal_gets_escapes_and_no_traceback(folder: Folder, tmp_path: Path) -> None:
    there = moved(folder, tmp_path / "数据")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    for words in (["plan", str(there.recipe)], ["run", str(there.recipe)], ["path", str(there.recipe), "tokens"], ["verify"]):
        done = there.call(*words, **plain)
        assert done.returncode == 0, done.stderr
    wrong = there.call("plan", str(there.recipe), "--set", "stage.tokens.context=十六", **plain)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("way", ["moved", "linked", "relative"])
def test_a_moved_cache_stays_valid(folder: Folder, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tmp_path / "elsewhere" / "cache"
    new.parent.mkdir()
    shutil.move(folder.cache, new)
    match way:
        case "moved":
            folder.cache = new
        case "linked":
            folder.cache.symlink_to(new)
        case "relative":
            monkeypatch.chdir(tmp_path)
            folder.cache = Path("elsewhere/cache")
            monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    assert folder.states() == ALL_CACHED
    done = folder.run("--set", "stage.tokens.context=16")
    assert done.returncode == 0, done.stderr
    assert "tokenizer  done" not in done.stderr


TRAINING = """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 16, layers = 1, heads = 1 }
batch_tokens = 64
budget = { steps = 4 }
schedule = { kind = "constant", learning_rate = 1e-3 }
"""


def test_a_training_runs_under_a_path_with_spaces_and_chinese_and_its_work_may_move(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "我的 项目")
    folder.write(RECIPE + TRAINING)
    work = folder.call("plan", str(folder.recipe), "--set", "stage.base.budget={steps=3}")
    assert work.returncode == 0, work.stderr
    done = folder.run()
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    there = moved(folder, tmp_path / "an other place" / "项目")
    assert set(there.states().values()) == {"cached"}

"""A stranger's folder with modules named like those of Python and of every package: none is ever imported."""

import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from small_recipe import Folder

from runner.engine import launch
from runner.safe_path import PYTHON, safe_environment

SHADOWED = {*sys.stdlib_module_names, *packages_distributions(), "sitecustomize", "usercustomize", "chat_template"}
# What Python itself imports under `-m` before a line of ours runs; `run`, the console script, does not look in the folder.
BEFORE_US = {
    "contextlib",
    "collections",
    "functools",
    "warnings",
    "types",
    "pkgutil",
    "importlib",
    "runner",
    "operator",
    "keyword",
    "reprlib",
    "heapq",
    "itertools",
    "typing",
    "re",
    "enum",
    "copyreg",
    "linecache",
    "tokenize",
    "token",
}


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    """A folder of such modules; each writes its name to a file when it is imported."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    said = tmp_path / "imported.txt"
    for name in SHADOWED:
        if name.isidentifier() and name not in ("llm", "runner"):
            (folder / f"{name}.py").write_text(f"with open({str(said)!r}, 'a') as file: file.write({name!r} + chr(10))\n")
    said.touch()
    return folder


def imported(traps: Path) -> list[str]:
    return (traps.parent / "imported.txt").read_text().split()


def run_in(folder: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_run_in_a_strangers_folder_imports_none_of_its_modules(traps: Path) -> None:
    """The corpus starts a pool of processes, and stages are forked from a server that has imported torch."""
    Folder(traps)
    run = Path(sys.executable).with_name("run")
    done = run_in(traps, [str(run), "recipe.toml", "--cache", str(traps / "cache")], STOCKPOT_CORES="2")
    assert done.returncode == 0, done.stderr
    assert imported(traps) == []


def test_the_processes_of_a_launcher_and_their_children_import_none(traps: Path) -> None:
    """The worker imports all it needs, then finds no job."""
    job = traps.parent / "job.json"
    environment = launch.environment_of(1, compiled=traps.parent) | {"ACCELERATE_USE_CPU": "true"}
    command = launch.group_command(job, 2)
    done = subprocess.run(command, cwd=traps, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "job.json" in done.stderr and done.returncode != 0
    assert imported(traps) == []


@pytest.mark.parametrize("module", ["runner.tracking.tracker_process", "runner.diagnostics.bench_worker"])
def test_other_processes_of_a_run_import_none(traps: Path, module: str) -> None:
    command = [*PYTHON, "-m", module, str(traps.parent / "none")]
    subprocess.run(command, cwd=traps, env=safe_environment(dict(os.environ)), capture_output=True, input="", text=True)
    assert imported(traps) == []


def test_every_command_that_starts_python_asks_for_the_safe_path() -> None:
    root = Path(launch.__file__).parents[2]
    unsafe = [
        f"{path}: {line.strip()}"
        for folder in ("llm", "runner")
        for path in (root / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "sys.executable" in line and '"-P"' not in line
    ]
    assert unsafe == []


@pytest.mark.parametrize("python_path", ["{empty}", "{root}:", ":{root}", ".:{root}", "{root}::"])
def test_an_empty_entry_of_the_python_path_is_not_the_current_folder(traps: Path, python_path: str) -> None:
    """Python itself looks there while it starts, before a line of ours: only what is imported later is shadowed here."""
    for path in traps.glob("*.py"):
        if path.stem not in ("tomli", "pydantic", "argcomplete"):
            path.unlink()
    root = os.pathsep.join(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)
    done = run_in(
        traps, [*PYTHON, "-c", "import runner, tomli, argcomplete"], PYTHONPATH=python_path.format(root=root, empty=f":{root}")
    )
    assert done.returncode == 0, done.stderr
    assert imported(traps) == []
    kept = safe_environment({"PYTHONPATH": ":/a:.:/b", "HOME": "/h"})
    assert kept == {"PYTHONPATH": "/a:/b", "PYTHONSAFEPATH": "1", "HOME": "/h"}


def test_the_module_form_leaves_the_folder_before_it_imports_anything_else(traps: Path) -> None:
    for name in BEFORE_US:
        (traps / f"{name}.py").unlink(missing_ok=True)
    done = run_in(traps, [sys.executable, "-m", "runner.cli", "schema"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["type"] == "object"
    assert imported(traps) == []

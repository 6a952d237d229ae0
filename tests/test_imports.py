"""The rules of imports hold, and each of them fails where an import breaks it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def ruff(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID", "llm", "runner"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the packages and of their rules."""
    for name in ("llm", "runner", "stockpot"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_rules_hold(copied: Path) -> None:
    for done in (lint_imports(copied), ruff(copied)):
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("importer", "statement", "rule"),
    [
        ("llm/training/step.py", "import runner.stage", "The model's code knows nothing of the runner"),
        ("llm/export/gguf.py", "import huggingface_hub", "The model's code knows nothing of the runner"),
        ("llm/layers/attention.py", "import llm.training.trainer", "llm: each layer imports those below it alone"),
        ("llm/export/gguf.py", "import llm.evaluation.scoring", "llm: each layer imports those below it alone"),
        ("runner/cache/store.py", "import runner.planning.plan", "runner: each layer imports those below it alone"),
        ("runner/execution/scheduler.py", "import runner.commands.run", "runner: each layer imports those below it alone"),
        ("runner/commands/run.py", "import stockpot.recipe", "The names for Python are above all"),
        ("llm/layers/fused_attention.py", "import llm.layers.attention", "No circles, in any folder"),
        ("runner/planning/plan.py", "import llm.inference.generate", "meet the model's code"),
    ],
)
def test_an_import_in_the_wrong_direction_fails(copied: Path, importer: str, statement: str, rule: str) -> None:
    path = copied / importer
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{statement}\n", encoding="utf-8")
    done = lint_imports(copied)
    broken = done.stdout.partition("Broken contracts")[2]
    assert done.returncode == 1 and rule in " ".join(broken.split()), done.stdout


def test_a_new_room_has_to_be_given_a_layer(copied: Path) -> None:
    (copied / "llm" / "helpers.py").write_text('"""A module that no layer names."""\n', encoding="utf-8")
    done = lint_imports(copied)
    assert done.returncode == 1 and "helpers" in done.stdout


@pytest.mark.parametrize(
    ("importer", "statement", "code"),
    [
        ("runner/planning/plan.py", "import torch", "TID253"),
        ("runner/execution/scheduler.py", "from huggingface_hub import HfApi", "TID253"),
        ("runner/commands/ui.py", "def opened():\n    from aim import Repo\n    return Repo", "TID251"),
    ],
)
def test_a_slow_import_at_the_top_and_aim_outside_of_tracking_fail(
    copied: Path, importer: str, statement: str, code: str
) -> None:
    path = copied / importer
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{statement}\n", encoding="utf-8")
    done = ruff(copied)
    assert done.returncode == 1 and code in done.stdout, done.stdout

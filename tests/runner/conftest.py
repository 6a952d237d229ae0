"""Fixtures of the tests that run a recipe: one that has run, made once, and copies of it."""

import shutil
from pathlib import Path

import pytest
from made_once import made_once
from small_recipe import Folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder whose recipe has run. Nothing changes it: tests that do take a copy."""

    def make(root: Path) -> None:
        done = Folder(root).run()
        assert done.returncode == 0, done.stderr

    return Folder(made_once(tmp_path_factory, "finished", make))


@pytest.fixture
def folder(finished: Folder, tmp_path: Path) -> Folder:
    """A copy of the folder whose recipe has run."""
    shutil.copytree(finished.root, tmp_path / "here")
    return Folder(tmp_path / "here")

"""Fixtures for tests that disturb a training: one that ran undisturbed, and copies of it."""

import shutil
from pathlib import Path

import pytest
from made_once import made_once
from small_recipe import RECIPE, Folder

TRAINING = """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 32, layers = 1, heads = 2 }
batch_tokens = 64
budget = { steps = 240 }
schedule = { learning_rate = 1e-3 }
checkpoint_every = 20
"""


@pytest.fixture(scope="session")
def trained(finished: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder with a finished, undisturbed training."""

    def make(root: Path) -> None:
        folder = Folder(shutil.copytree(finished.root, root))
        folder.write(RECIPE + TRAINING)
        done = folder.run()
        assert done.returncode == 0, done.stderr

    return Folder(made_once(tmp_path_factory, "trained", make))


@pytest.fixture
def fresh(trained: Folder, tmp_path: Path) -> Folder:
    """A copy with everything but the training in its cache."""
    shutil.copytree(trained.root, tmp_path / "copy")
    folder = Folder.__new__(Folder)
    folder.root, folder.recipe, folder.cache = tmp_path / "copy", tmp_path / "copy/recipe.toml", tmp_path / "copy/cache"
    key = folder.artifact("base").name.partition("-")[2]
    shutil.rmtree(folder.artifact("base"))
    (folder.cache / "records" / f"{key}.json").unlink()
    return folder

"""After any kill at any time the next run resumes, and every artifact has the bytes of an undisturbed run."""

from pathlib import Path

import pytest
from killing import Victim, torture
from small_recipe import RECIPE, Folder

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.toml"
OFTEN = [word for stage in ("base", "chat", "medical") for word in ("--set", f"stage.{stage}.checkpoint_every=4")]
PRETRAIN = """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 32, layers = 2, heads = 2, dropout = 0.1 }
batch_tokens = 128
budget = { steps = 120 }
schedule = { kind = "wsd", decay_steps = 40 }
checkpoint_every = 10
validate_every = 50
"""


def test_some_kills_of_a_small_recipe_change_nothing(folder: Folder, tmp_path: Path) -> None:
    killed = Folder(tmp_path / "killed")
    for one in (folder, killed):
        one.write(RECIPE + PRETRAIN)
    whole = Victim(folder.recipe, folder.cache)
    whole.run()  # all but the training is cached
    figures = torture(Victim(killed.recipe, killed.cache), kills=3, seed=0, longest=6.0, expected=whole.digests())
    assert figures.kills.total() == 3 and figures.finished


@pytest.mark.long
def test_a_hundred_kills_of_the_quickstart_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Victim(QUICKSTART, tmp_path / "whole", *OFTEN)  # with the same options, since a release holds the recipe
    whole.run()
    victim = Victim(QUICKSTART, tmp_path / "killed", *OFTEN)
    figures = torture(victim, kills=100, seed=0, longest=10.0, expected=whole.digests())
    with capsys.disabled():
        print(f"\n{figures}")
    assert len(figures.during) > 6, "stages of many kinds were hit"

"""The speed of this machine: measured once, remembered, and used by `run plan` where no training was recorded."""

import json
import re
from pathlib import Path

import pytest

from runner.cache.store import Store
from runner.commands.plan import table
from runner.diagnostics import machine_speed
from runner.planning.cost import START_SECONDS, costs
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe

RECIPE = """name = "x"
[stage.text]
kind = "corpus"
sources = [{ files = "a.txt" }]
[stage.words]
kind = "tokenizer"
corpus = "text"
vocab_size = 1024
[stage.tokens]
kind = "pack"
corpus = "text"
tokenizer = "words"
context = 128
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 64, layers = 2, heads = 2 }
batch_tokens = 1024
budget = { tokens = 1_024_000 }
schedule = { kind = "constant", learning_rate = 1e-3 }
"""


def test_it_is_measured_by_real_steps_once_and_not_remembered_of_a_busy_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine_speed, "PACE_SECONDS", 0.2)
    assert machine_speed.machine_speed() is None, "nothing is measured unless that is told"
    said: list[str] = []
    monkeypatch.setattr(machine_speed, "BUSY", -1.0)
    first = machine_speed.machine_speed(say=said.append)
    assert first is not None and 1e8 < first < 1e13
    assert "busy with other work" in said[0] and not (tmp_path / "speeds").exists()
    monkeypatch.setattr(machine_speed, "BUSY", 1e9)
    second = machine_speed.machine_speed(say=said.append)
    assert machine_speed.machine_speed(say=said.append) == second == machine_speed.machine_speed()
    assert len(said) == 2
    (kept,) = (tmp_path / "speeds").iterdir()
    assert json.loads(kept.read_text()) == second


def test_a_plan_has_times_of_trainings_on_a_machine_without_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words\n")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    plan = Plan(load_recipe(tmp_path / "recipe.toml"), Store(tmp_path / "cache"))
    assert costs(plan, [])["base"].seconds is None
    slow, fast = (costs(plan, [], machine=speed)["base"].seconds for speed in (1e10, 1e11))
    assert slow is not None and fast is not None
    assert slow - START_SECONDS == pytest.approx(10 * (fast - START_SECONDS))
    last = table(plan, costs(plan, [], machine=1e10))[-1]
    assert re.fullmatch(r"total time: \d+:\d\d for base; .* no record for text, words, tokens", last)
    assert 200 < slow < 1000  # 6 x 0.16M x 1.0M operations, and 1,000 steps

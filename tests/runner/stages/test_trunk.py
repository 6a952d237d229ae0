"""A pretraining with a trunk of its own: what it becomes, what is shared, and what a longer one has left to do."""

import json
from typing import Any

import pytest
from safetensors.torch import load_file
from small_recipe import RECIPE, Folder

from llm.training.config import Budget
from runner.artifacts import TrainingState
from runner.cache.store import Store
from runner.errors import RecipeError
from runner.planning.cost import costs
from runner.planning.plan import Plan
from runner.recipe.recipe import Recipe, load_recipe
from runner.stages.pretrain import Pretrain, Trunk

BASE = """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 32, layers = 1, heads = 2, dropout = 0.1 }
batch_tokens = 256
budget = { tokens = 6000 }
schedule = { kind = "wsd", learning_rate = 1e-2, warmup_steps = 3, decay_steps = 8 }
"""
LONGER = "stage.base.budget.tokens=8000"  # 32 steps instead of 24
TRUNK = """
[stage.trunk]
kind = "trunk"
tokens = "tokens"
architecture = { hidden_size = 32, layers = 1, heads = 2, dropout = 0.1 }
batch_tokens = 256
budget = { tokens = 4096 }
schedule = { kind = "constant", learning_rate = 1e-2, warmup_steps = 3 }
"""


def loaded(folder: Folder, text: str, *overrides: str) -> Recipe:
    folder.write(RECIPE + text)
    return load_recipe(folder.recipe, overrides)


def pretraining(recipe: Recipe, name: str = "base") -> Pretrain:
    stage = recipe.stages[name]
    assert isinstance(stage, Pretrain)
    return stage


def metrics(folder: Folder, stage: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder.artifact(stage) / "record.json").read_text())
    return record["metrics"] | {"beginning": record.get("beginning")}


def test_a_training_with_a_wsd_schedule_becomes_a_trunk_and_the_rest(folder: Folder) -> None:
    recipe = loaded(folder, BASE)
    trunk = recipe.stages["base-trunk"]
    assert isinstance(trunk, Trunk) and pretraining(recipe).trunk == "base-trunk"
    assert trunk.budget == Budget(steps=16) and trunk.schedule.kind == "constant"
    assert "base-trunk" not in recipe.resolved()["stage"], "it is found anew, so another budget stays possible"


@pytest.mark.parametrize(
    "change",
    [
        "keep_trunk=false",
        "budget={ epochs = 2 }",
        "budget.tokens=2000",  # 8 steps: all of them decay
        "schedule.kind=cosine",
    ],
)
def test_other_schedules_are_not_split(folder: Folder, change: str) -> None:
    recipe = loaded(folder, BASE, f"stage.base.{change}")
    assert "base-trunk" not in recipe.stages and pretraining(recipe).trunk is None


def test_fields_of_the_decay_are_not_part_of_the_trunk(folder: Folder) -> None:
    folder.write(RECIPE + BASE)

    def trunk_key(*overrides: str) -> str | None:
        plan = Plan(load_recipe(folder.recipe, overrides), Store(folder.cache))
        return plan.entries["base-trunk"].key

    first = trunk_key()
    assert trunk_key("stage.base.schedule.min_learning_rate=1e-3") == first
    assert trunk_key("stage.base.budget.tokens=5000", "stage.base.schedule.decay_steps=4") == first  # 20 steps
    assert trunk_key(LONGER) != first
    assert trunk_key("stage.base.seed=5") != first


def test_differences_from_a_named_trunk_are_reported(folder: Folder) -> None:
    named = TRUNK + BASE + 'trunk = "trunk"\n'
    recipe = loaded(folder, named)
    assert list(recipe.stages)[-2:] == ["trunk", "base"] and pretraining(recipe).trunk == "trunk"
    assert recipe.stages["trunk"].model_dump()["budget"]["steps"] == 16
    wrong = ("seed=9", "schedule.learning_rate=1e-3", "architecture.layers=2", "schedule.decay_steps=9")
    with pytest.raises(RecipeError) as caught:
        loaded(folder, named, *(f"stage.base.{change}" for change in wrong))
    told = str(caught.value)
    assert "stage.base.seed: expected 0 as in its trunk 'trunk', got 9" in told
    assert "stage.base.schedule.learning_rate: expected 0.01 as in its trunk 'trunk', got 0.001" in told
    assert "stage.base.architecture.layers: expected 1 as in its trunk 'trunk', got 2" in told
    assert "stage.base.trunk: expected at most 15 steps, where the rate starts to go down, got 16 in 'trunk'" in told
    with pytest.raises(RecipeError, match=r"schedule\.kind: expected .constant. for a trunk, got .wsd."):
        loaded(folder, TRUNK, "stage.trunk.schedule.kind=wsd")
    with pytest.raises(RecipeError, match="budget: expected tokens or steps for a trunk, got epochs"):
        loaded(folder, TRUNK, "stage.trunk.budget={ epochs = 1 }")


def test_a_longer_training_trains_only_the_new_steps_and_ends_like_an_unsplit_one(folder: Folder) -> None:
    loaded(folder, BASE)
    assert folder.run("--until", "base-trunk").returncode == 0
    assert metrics(folder, "base-trunk")["steps"] == 16
    recipe = load_recipe(folder.recipe, [LONGER])
    plan = Plan(recipe, Store(folder.cache))
    entry = plan.entries["base-trunk"]
    assert entry.state == "resume" and entry.reason.startswith("continues from small's base-trunk; budget.steps: 16 -> 24")
    cost = costs(plan, Store(folder.cache).records(["pretrain", "trunk"]))
    assert (cost["base-trunk"].tokens, cost["base"].tokens) == (8 * 256, 8000 - 24 * 256)

    done = folder.run("--set", LONGER)
    assert done.returncode == 0, done.stderr
    folder.write(folder.recipe.read_text().replace("tokens = 6000", "tokens = 8000"))
    trunk, base = metrics(folder, "base-trunk"), metrics(folder, "base")
    assert (trunk["first_step"], trunk["steps"]) == (16, 24) and trunk["beginning"]["kind"] == "trunk"
    assert (base["first_step"], base["steps"], base["tokens"]) == (24, 32, 32 * 256)
    state = TrainingState(folder.artifact("base-trunk"))
    assert load_file(state.optimizer) and json.loads(state.training.read_text())["step"] == 24
    digest, weights = folder.digest("base"), (folder.artifact("base") / "model.safetensors").read_bytes()

    done = folder.run("--set", "stage.base.keep_trunk=false")
    assert done.returncode == 0, done.stderr
    folder.write(folder.recipe.read_text() + "keep_trunk = false\n")
    whole = metrics(folder, "base")
    assert "first_step" not in whole and whole["steps"] == 32
    assert (whole["loss"], whole["validation_loss"]) == (base["loss"], base["validation_loss"])
    assert folder.digest("base") == digest and (folder.artifact("base") / "model.safetensors").read_bytes() == weights


def test_only_a_shorter_but_otherwise_equal_trunk_can_be_continued() -> None:
    def identity(steps: int, **fields: Any) -> dict[str, Any]:
        return {"kind": "trunk", "version": 1, "fields": {"seed": 1, "budget": {"steps": steps}, **fields}}

    trunk = Trunk.model_construct(budget=Budget(steps=20))
    assert trunk.reusable_work(identity(20), identity(12)) == 12
    assert trunk.reusable_work(identity(20), identity(28)) == 0
    assert trunk.reusable_work(identity(20), identity(12, seed=2)) == 0
    assert trunk.reusable_work(identity(20), {**identity(12), "version": 2}) == 0
    careful = Trunk.model_validate(
        {
            "tokens": "tokens",
            "architecture": {"hidden_size": 32, "layers": 1, "heads": 2},
            "budget": {"steps": 20},
            "schedule": {"kind": "constant"},
            "alerts": {"not_finite": {"action": "rollback"}},
        }
    )
    assert careful.reusable_work(identity(20), identity(12)) == 0, "a rollback may go back behind the end of the shorter one"

"""What a plan says that stages will cost: from records of this machine, checked against numbers worked out by hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llm.models.llama.config import LlamaConfig, flops_per_token, parameter_count
from llm.models.llama.model import Llama
from runner.cache.record import Record
from runner.cache.store import Store
from runner.cli import main
from runner.cost import Cost, costs, total
from runner.plan import Plan
from runner.recipe import load_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"


def record(kind: str, seconds: float, *, cores: int | None = None, **metrics: Any) -> Record:
    hardware = {"cores": cores or os.cpu_count()}
    return Record({"kind": kind, "key": "0" * 64, "seconds": seconds, "metrics": metrics, "hardware": hardware})


def costs_of(cache: Path, records: list[Record], **options: Any) -> dict[str, Cost]:
    recipe = load_recipe(QUICKSTART)
    return costs(recipe, Plan(recipe, Store(cache)), records, **options)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 32, "layers": 2, "heads": 2},
        {"hidden_size": 48, "layers": 1, "heads": 4, "kv_heads": 2, "tied": False, "intermediate_size": 80},
        {"hidden_size": 32, "layers": 3, "heads": 2, "head_size": 32},
    ],
)
def test_the_model_has_the_weights_and_operations_that_planning_says(sizes: dict[str, Any]) -> None:
    config = LlamaConfig(**sizes, context=64)
    model = Llama(config, vocab_size=101)
    assert parameter_count(config, vocab_size=101) == sum(weight.numel() for weight in set(model.parameters()))
    assert flops_per_token(config, vocab_size=101, context=64) == model.flops_per_token(64)


def test_a_training_costs_operations_at_the_pace_of_its_kind(tmp_path: Path) -> None:
    paces = [record("pretrain", 10.0, flops=1e12, parameters=1), record("pretrain", 40.0, flops=1e12, parameters=1)]
    base = costs_of(tmp_path, [*paces, record("pretrain", 1.0, cores=999, flops=1e12, parameters=1)])["base"]
    assert base.flops is not None and base.tokens is not None and base.runs == 2
    assert (base.low, base.high) == (pytest.approx(1e-11 * base.flops), pytest.approx(4e-11 * base.flops))
    assert base.seconds == pytest.approx(2.5e-11 * base.flops)


def test_other_stages_cost_what_their_kind_took(tmp_path: Path) -> None:
    found = costs_of(tmp_path, [record("corpus", seconds) for seconds in (2.0, 3.0, 10.0)])
    assert (found["corpus"].seconds, found["corpus"].low, found["corpus"].high) == (3.0, 2.0, 10.0)
    assert found["tokens"].seconds is None and total(found).seconds is None


def test_what_was_measured_counts_before_records(tmp_path: Path) -> None:
    found = costs_of(tmp_path, [record("pretrain", 10.0, flops=1e12, parameters=1)], measured=2e9)
    for name in ("base", "medical"):  # of the second kind there is no record
        flops = found[name].flops
        assert flops is not None and found[name].seconds == pytest.approx(flops / 2e9)


def test_the_total_is_the_sum_of_all(tmp_path: Path) -> None:
    both = {"a": Cost(seconds=1.0, low=0.5, high=2.0, runs=3), "b": Cost(seconds=2.0, low=2.0, high=2.0, runs=1)}
    assert total(both) == Cost(seconds=3.0, low=2.5, high=4.0, runs=1)


def test_the_plan_shows_costs_to_people_and_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(QUICKSTART), "--cache", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("stage") and "no record of this machine tells" in told
    assert main(["plan", str(QUICKSTART), "--cache", str(tmp_path), "--json"]) == 0
    stages = {stage["name"]: stage["cost"] for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["base"]["parameters"] > 100_000 and stages["corpus"]["parameters"] is None


@pytest.mark.long
def test_measuring_gives_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(QUICKSTART), "--cache", str(tmp_path), "--measure", "--json"]) == 0
    base = next(stage for stage in json.loads(capsys.readouterr().out)["stages"] if stage["name"] == "base")
    assert 0.1 < base["cost"]["seconds"] < 600

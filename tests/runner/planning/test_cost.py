"""What a plan says that stages will cost: from records of this machine, checked against numbers worked out by hand."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llm.models.llama.config import LlamaConfig, flops_per_token, parameter_count
from llm.models.llama.model import Llama
from runner.cache.record import Record
from runner.cache.store import Store
from runner.cli import main
from runner.planning.cost import Cost, costs, expected_seconds, spare, text_size, total
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe
from runner.resources import available_cores

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.toml"


def record(kind: str, took: float, /, *, cores: int | None = None, **metrics: Any) -> Record:
    hardware = {"cores": cores or available_cores()}
    return Record({"kind": kind, "key": "0" * 64, "seconds": took, "metrics": metrics, "hardware": hardware})


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


def training(kind: str, seconds: float, *, start: float = 0.0, cores: int | None = None, **metrics: Any) -> Record:
    """One of 100 steps of 2,000 tokens and 1e7 operations a token."""
    taken = {"flops": 2e12, "tokens": 200_000, "steps": 100, "parameters": 1, "seconds": seconds}
    return record(kind, start + seconds, cores=cores, **taken | metrics)


def work(flops: float, tokens: float, steps: float) -> float:
    return flops + 1e6 * tokens + 2.5e9 * steps


def test_a_training_costs_its_work_at_the_pace_of_its_kind(tmp_path: Path) -> None:
    records = [training("pretrain", 10.0), training("pretrain", 40.0), training("pretrain", 1.0, cores=999)]
    base = costs_of(tmp_path, records)["base"]
    assert base.flops is not None and base.tokens is not None and base.runs == 2
    times = work(base.flops, base.tokens, base.tokens / 2048) / work(2e12, 200_000, 100)
    assert (base.low, base.high) == (pytest.approx(10 * times), pytest.approx(40 * times))
    assert base.seconds == pytest.approx(25 * times)


def test_what_comes_before_the_first_step_takes_as_long_for_every_size(tmp_path: Path) -> None:
    slow, at_once = (costs_of(tmp_path, [training("pretrain", 10.0, start=start)])["base"].seconds for start in (30.0, 0.0))
    assert slow is not None and at_once is not None and slow - at_once == pytest.approx(30.0)


def test_a_model_with_more_operations_takes_less_than_so_many_times_as_long(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART.with_name("medical-lora.toml"))
    small = {"flops": 196 * 2048 * 4.52e6, "tokens": 196 * 2048, "steps": 196}
    found = costs(recipe, Plan(recipe, Store(tmp_path)), [training("pretrain", 14.3, start=5.2, **small)])
    seconds = [found[name].seconds or 0.0 for name in ("base-trunk", "base")]
    assert sum(seconds) == pytest.approx(2 * 5.2 + 1954 * 0.211, rel=0.1), "2 cores took 0.073 s and 0.211 s a step"


def test_attempts_that_may_not_be_needed_are_not_in_the_sum(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART.with_name("medical-lora.toml"))
    plan = Plan(recipe, Store(tmp_path))
    assert spare(plan) == {"medical@2", "release@2", "after@2"}
    assert expected_seconds(recipe, Store(tmp_path)) == dict.fromkeys(spare(plan), 0.0)


def test_an_evaluation_costs_what_it_reads_and_writes(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART)
    plan = Plan(recipe, Store(tmp_path))
    task = {"prompt_tokens": 30_000, "prompt_tokens_per_second": 10_000}
    asked = Record({**record("evaluate", 9.0, tasks={"x": task}).data, "inputs": {"model": {"key": "0" * 64}}})
    model = training("sft", 1.0, flops=200_000 * 4.5e6)
    found = costs(recipe, plan, [asked, model])["before"]
    shape = costs(recipe, plan, [])["base"]
    assert shape.flops and shape.tokens and found.seconds is not None
    # 200 of 833 rows of 369,070 bytes and 50 of 741 of 624,556, at 4 bytes a token; 6 s of the record are its start.
    positions = 200 * 369_070 / 833 / 4 + 50 * 624_556 / 741 / 4
    pace = 3.0 / (30_000 * (1.5e6 + 3.5e6))
    assert found.seconds == pytest.approx(6.0 + pace * positions * (shape.flops / shape.tokens / 3 + 3.5e6), rel=0.02)


def test_the_size_of_text_is_known_by_its_beginning(tmp_path: Path) -> None:
    text = "".join(f"{number}: the heart pumps blood\n" for number in range(50_000)).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(text)
    for name in ("a.jsonl", "a.jsonl.gz"):
        found = text_size(tmp_path / name)
        assert found.rows == pytest.approx(50_000, rel=0.05) and found.bytes == pytest.approx(len(text), rel=0.05)
    (tmp_path / "none.jsonl").touch()
    assert text_size(tmp_path / "none.jsonl").rows == 0


def test_other_stages_cost_what_their_kind_took(tmp_path: Path) -> None:
    found = costs_of(tmp_path, [record("corpus", seconds) for seconds in (2.0, 3.0, 10.0)])
    assert (found["corpus"].seconds, found["corpus"].low, found["corpus"].high) == (3.0, 2.0, 10.0)
    assert found["tokens"].seconds is None and total(found).seconds is None


def test_what_was_measured_counts_before_records(tmp_path: Path) -> None:
    found = costs_of(tmp_path, [training("pretrain", 10.0)], measured=2e9)
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

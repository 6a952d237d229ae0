"""The estimated cost of stages, from records of this machine, checked against numbers worked out by hand."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from foreign_models import smollm

from llm.models import from_transformers
from llm.models.decoder.config import DecoderConfig, flops_per_token, parameter_count
from llm.models.decoder.model import Decoder
from runner.cache.record import Record
from runner.cache.store import Store
from runner.cli import main
from runner.commands.plan import table
from runner.planning.cost import Cost, costs, expected_seconds, spare_stages, total, trainings_ahead
from runner.planning.model_shape import text_bytes
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe
from runner.resources import available_cores

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.toml"


def record(kind: str, took: float, /, *, cores: int | None = None, **metrics: Any) -> Record:
    hardware = {"cores": cores or available_cores()}
    return Record({"kind": kind, "key": "0" * 64, "seconds": took, "metrics": metrics, "hardware": hardware})


def costs_of(cache: Path, records: list[Record], **options: Any) -> dict[str, Cost]:
    recipe = load_recipe(QUICKSTART)
    return costs(Plan(recipe, Store(cache)), records, **options)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 32, "layers": 2, "heads": 2},
        {"hidden_size": 48, "layers": 1, "heads": 4, "kv_heads": 2, "tied": False, "intermediate_size": 80},
        {"hidden_size": 32, "layers": 3, "heads": 2, "head_size": 32},
    ],
)
def test_planning_knows_the_parameters_and_operations_of_the_model(sizes: dict[str, Any]) -> None:
    config = DecoderConfig(**sizes, context=64)
    model = Decoder(config, vocab_size=101)
    assert parameter_count(config, vocab_size=101) == sum(weight.numel() for weight in set(model.parameters()))
    assert flops_per_token(config, vocab_size=101, context=64) == model.flops_per_token(64)


def training(kind: str, seconds: float, *, start: float = 0.0, cores: int | None = None, **metrics: Any) -> Record:
    """A training of 100 steps of 2,000 tokens and 1e7 operations per token."""
    taken = {"flops": 2e12, "tokens": 200_000, "steps": 100, "parameters": 1, "seconds": seconds}
    return record(kind, start + seconds, cores=cores, **taken | metrics)


def work(flops: float, tokens: float, steps: float) -> float:
    return flops + 1e6 * tokens + 2.5e9 * steps


def test_a_training_takes_its_work_at_the_recorded_speed_of_its_kind(tmp_path: Path) -> None:
    records = [training("pretrain", 10.0), training("pretrain", 40.0), training("pretrain", 1.0, cores=999)]
    base = costs_of(tmp_path, records)["base"]
    assert base.flops is not None and base.tokens is not None and base.runs == 2
    times = work(base.flops, base.tokens, base.tokens / 2048) / work(2e12, 200_000, 100)
    assert (base.low, base.high) == (pytest.approx(10 * times), pytest.approx(40 * times))
    assert base.seconds == pytest.approx(25 * times)


def test_the_start_of_a_training_takes_the_same_time_for_every_size(tmp_path: Path) -> None:
    slow, at_once = (costs_of(tmp_path, [training("pretrain", 10.0, start=start)])["base"].seconds for start in (30.0, 0.0))
    assert slow is not None and at_once is not None and slow - at_once == pytest.approx(30.0)


def test_time_grows_less_than_the_operations_of_a_model(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART.with_name("medical-lora.toml"))
    small = {"flops": 196 * 2048 * 4.52e6, "tokens": 196 * 2048, "steps": 196}
    found = costs(Plan(recipe, Store(tmp_path)), [training("pretrain", 14.3, start=5.2, **small)])
    seconds = [found[name].seconds or 0.0 for name in ("base-trunk", "base")]
    assert sum(seconds) == pytest.approx(2 * 5.2 + 1954 * 0.211, rel=0.1), "2 cores took 0.073 s and 0.211 s a step"


def test_spare_attempts_are_not_in_the_sum(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART.with_name("medical-lora.toml"))
    plan = Plan(recipe, Store(tmp_path))
    assert spare_stages(plan) == {"medical@2", "release@2", "after@2"}
    assert expected_seconds(recipe, Store(tmp_path)) == dict.fromkeys(spare_stages(plan), 0.0)


def test_the_size_of_compressed_text_is_estimated_from_its_beginning(tmp_path: Path) -> None:
    text = "".join(f"{number}: the heart pumps blood\n" for number in range(50_000)).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(text)
    assert text_bytes(tmp_path / "a.jsonl") == len(text)
    assert text_bytes(tmp_path / "a.jsonl.gz") == pytest.approx(len(text), rel=0.05)
    (tmp_path / "empty.jsonl.gz").touch()
    assert text_bytes(tmp_path / "empty.jsonl.gz") == 0


@pytest.mark.parametrize(("kind", "stage"), [("corpus", "corpus"), ("evaluate", "before")])
def test_other_stages_take_as_long_as_records_of_their_kind(tmp_path: Path, kind: str, stage: str) -> None:
    found = costs_of(tmp_path, [record(kind, seconds) for seconds in (2.0, 3.0, 10.0)])
    assert (found[stage].seconds, found[stage].low, found[stage].high) == (3.0, 2.0, 10.0)
    assert found["tokens"].seconds is None and total(found).seconds is None


def test_a_measured_speed_takes_precedence_over_records(tmp_path: Path) -> None:
    found = costs_of(tmp_path, [training("pretrain", 10.0)], measured={"pretrain": 2e9})
    for name in ("base", "medical"):  # of the second kind there is no record
        flops = found[name].flops
        assert flops is not None and found[name].seconds == pytest.approx(flops / 2e9)


def test_the_total_is_the_sum_of_all(tmp_path: Path) -> None:
    both = {"a": Cost(seconds=1.0, low=0.5, high=2.0, runs=3), "b": Cost(seconds=2.0, low=2.0, high=2.0, runs=1)}
    assert total(both) == Cost(seconds=3.0, low=2.5, high=4.0, runs=1)


def test_the_plan_shows_costs_to_people_and_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(QUICKSTART), "--cache", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("stage") and "this machine has no record for" in output
    assert main(["plan", str(QUICKSTART), "--cache", str(tmp_path), "--json"]) == 0
    stages = {stage["name"]: stage["cost"] for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["base"]["parameters"] > 100_000 and stages["corpus"]["parameters"] is None


@pytest.mark.long
def test_measuring_gives_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(QUICKSTART), "--cache", str(tmp_path), "--measure", "--json"]) == 0
    base = next(stage for stage in json.loads(capsys.readouterr().out)["stages"] if stage["name"] == "base")
    assert 0.1 < base["cost"]["seconds"] < 600


def test_memory_of_a_pretraining_grows_with_its_rows_and_the_rows_of_a_micro_batch(tmp_path: Path) -> None:
    def memory(*overrides: str) -> float:
        recipe = load_recipe(QUICKSTART.with_name("medical-lora.toml"), ["stage.base.batch_tokens=1048576", *overrides])
        found = costs(Plan(recipe, Store(tmp_path)), [])["base"].memory
        assert found is not None
        return found

    short = memory()
    position = (memory("stage.tokens.context=131072") - short) / (131072 - 4096)  # "auto": one row, or 4,096 positions
    assert position == 40 * 4 * 192  # bytes, layers, channels
    assert memory("stage.base.micro_batch=4") - short == pytest.approx((4 * 256 - 4096) * position)


ADOPTED = """
name = "adopted"
[stage.base]
kind = "checkpoint"
folder = "source"
[stage.medical]
kind = "lora"
base = "base"
data = [{ files = "rows.jsonl" }]
batch_tokens = 4096
budget = { tokens = 40_960 }
"""


@pytest.fixture
def adopted(tmp_path: Path) -> Path:
    """A recipe that adapts a model of 8,192 positions with chats of a few words; nothing has run."""
    smollm(tmp_path / "source", max_position_embeddings=8192)
    rows = [{"prompt": f"What is {number}?", "response": "A number. " * 40} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(ADOPTED)
    return tmp_path / "recipe.toml"


def test_an_adopted_model_costs_what_its_rows_cost_not_what_its_longest_would(adopted: Path) -> None:
    plan = Plan(load_recipe(adopted), Store(adopted.parent / "cache"))
    assert trainings_ahead(plan) == {"lora": "medical"}  # before it is imported
    config = from_transformers(json.loads((adopted.parent / "source" / "config.json").read_text()), dropout=0.0)
    position = {row: flops_per_token(config, vocab_size=384, context=row) for row in (256, 8192)}
    cost = costs(plan, [])["medical"]
    assert cost.flops == 40_960 * position[256]  # about 430 bytes a line
    assert cost.flops < 40_960 * position[8192] / 2
    long = costs(Plan(load_recipe(adopted, ["stage.medical.context=8192"]), Store(adopted.parent / "cache")), [])["medical"]
    assert cost.memory is not None and long.memory is not None and cost.memory <= long.memory


def test_memory_of_an_adapter_is_that_of_a_frozen_base_and_grows_with_the_vocabulary(tmp_path: Path) -> None:
    def memory(vocab_size: int, kind: str = "lora") -> float:
        smollm(tmp_path / f"{kind}-{vocab_size}", vocab_size=vocab_size)
        text = ADOPTED.replace('"source"', f'"{kind}-{vocab_size}"').replace('"rows.jsonl"', '"recipe.toml"')
        text = text.replace('"lora"', f'"{kind}"').replace("base = ", "model = " if kind == "sft" else "base = ")
        (tmp_path / "recipe.toml").write_text(text.replace("recipe.toml", "rows.jsonl"))
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        found = costs(Plan(load_recipe(tmp_path / "recipe.toml"), Store(tmp_path / "cache")), [])["medical"].memory
        assert found is not None
        return found

    more = 60_000
    assert memory(384 + more) - memory(384) == more * (32 * 4 + 512 * 12)  # the embedding, held; and logits
    assert memory(384 + more, "sft") - memory(384, "sft") == more * (32 * 16 + 512 * 12)


def test_a_plan_shows_the_beginning_of_a_long_reason(adopted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = adopted.parent / "cache"
    plan = Plan(load_recipe(adopted), Store(cache))
    entry = plan.entries["base"]
    folder = cache / "stages" / f"checkpoint-{entry.key}"
    assert entry.identity is not None and not folder.exists()
    reason = "; ".join(f"field_{number}: 1 -> 2" for number in range(60))
    plan.entries["base"] = replace(entry, reason=reason)
    first = table(plan, {})[0]
    assert len(first) < 200 and "`run why` shows all" in first

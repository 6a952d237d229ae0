"""`run bench` as a user calls it, on a recipe that has not run; with so little time, only relations are tested."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import llama_3
from small_recipe import RECIPE

from llm.bench.implementations import StockpotTraining, build_learning_model
from llm.bench.peft_training import PeftTraining, stock_steps
from llm.bench.train_step import measure_stockpot_step
from llm.bench.workload import Workload
from llm.training.distributed.process_group import ProcessGroup
from runner.cache.store import Store
from runner.diagnostics.bench import chosen, measure, model_job, recipe_job, reference_job
from runner.diagnostics.bench_tables import show
from runner.diagnostics.bench_worker import _with_model
from runner.errors import RecipeError, StageError
from runner.recipe.recipe import load_recipe

PRETRAIN = """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 32, layers = 2, heads = 2 }
batch_tokens = 128
micro_batch = 2
optimizer = { kind = "muon" }
checkpoint_minutes = 2.0
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.jsonl").write_text('{"text": "The heart pumps blood."}\n')
    (folder / "recipe.toml").write_text(RECIPE + PRETRAIN)
    (folder / "base.toml").write_text(RECIPE)
    return folder / "recipe.toml"


def run(recipe: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner.cli", "bench", *words, "--cache", str(recipe.parent / "cache")]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def result(recipe: Path) -> dict[str, Any]:
    return measured(recipe, "matmul,train,memory,machinery")


def measured(recipe: Path, only: str) -> dict[str, Any]:
    done = run(recipe, str(recipe), "--json", "--seconds", "0.1", "--no-compile", "--only", only)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)  # nothing else is on it
    return found


def test_it_measures_the_model_and_step_of_the_recipe(result: dict[str, Any]) -> None:
    model = result["model"]
    assert (model["recipe"], model["stage"]) == ("small", "base")
    assert (model["vocab_size"], model["context"], model["rows"], model["micro_batch"]) == (300, 32, 4, 2)
    assert model["architecture"]["context"] == 32  # of the tokens
    assert result["machine"]["threads"] >= 1 and "torch" in result["machine"]["versions"]


def test_every_figure_is_there_and_they_agree(result: dict[str, Any]) -> None:
    assert min(result["matmul"][precision]["gflops"] for precision in ("fp32", "bf16")) > 0
    steps = result["train"]["candidates"]
    assert set(steps) == {"ours", "ours_muon", "transformers_fp32", "transformers_bf16"}
    for one in steps.values():
        assert 0 < one["share_of_peak"] < 1
        assert one["tokens_per_second"] == pytest.approx(128 / one["seconds_per_step"])
    for name in ("transformers_fp32", "transformers_bf16"):
        quotients = [a / b for a, b in zip(steps[name]["rounds"], steps["ours"]["rounds"], strict=True)]
        assert min(quotients) <= steps[name]["ours_times_as_fast"] <= max(quotients)
    losses = result["train"]["first_loss"]
    assert losses["ours"] == pytest.approx(losses["transformers"], rel=0.01)

    memory = result["memory"]
    assert memory["share"] == pytest.approx(memory["ours"] / memory["transformers_fp32"])
    assert 0 < memory["ours"] < 2**30  # the model is small, and importing torch is not counted

    machinery = result["machinery"]
    assert machinery["total"] == pytest.approx(sum(machinery[name] for name in ("data", "tracking", "checkpoints")))
    assert min(machinery[name] for name in ("data", "tracking", "checkpoints")) > 0
    assert machinery["rows"] == "made up"  # no tokens are in the cache


def test_each_measurement_is_shown_as_a_table(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    show(result)
    printed = capsys.readouterr().out
    for text in (
        "Matrix products",
        "ours, Muon",
        "Transformers, fp32 eager",
        "Peak memory",
    ):
        assert text in printed
    assert f"{result['train']['candidates']['ours']['tokens_per_second']:,.0f}" in printed
    assert "None" not in printed and "nan" not in printed


@pytest.mark.long  # test_measurements.py has the measurement
def test_decoding_of_the_recipe_is_compared_with_transformers(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(recipe, "decode")
    show(result)
    assert "Decoding" in capsys.readouterr().out
    assert set(result["decode"]["batch"]) == {"1", "8"}
    for batch, one in result["decode"]["batch"].items():
        assert one["ours_same_prompts"] == int(batch)
        assert one["ours"] > 0 and one["transformers"] > 0


@pytest.mark.long
def test_fine_tuning_with_adapters_is_compared_with_training_all_weights(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = measured(recipe, "lora")
    show(result)
    printed = capsys.readouterr().out
    assert "LoRA, r = 8" in printed and "nf4 of bf16" in printed
    ways = result["lora"]["ways"]
    assert list(ways) == ["full", "lora", "qlora"]
    assert ways["full"]["trained_share"] == ways["full"]["time_of_full"] == ways["full"]["memory_of_full"] == 1
    for name in ("lora", "qlora"):
        # q, k, v, o: 32 + 32; gate, up, down: 32 + 128; each times the rank of 8, in 2 layers
        assert ways[name]["trained_parameters"] == 2 * 8 * (4 * 64 + 3 * 160)
        assert 0 < ways[name]["trained_share"] < 1 and ways[name]["peak_memory_bytes"] > 0
    model = result["model"]["parameters"]
    embedded = 300 * 32 * 4
    linear = 2 * (4 * 32 * 32 + 3 * 32 * 128)
    assert result["lora"]["base"]["bf16_bytes"] == 2 * model
    assert linear / 2 + embedded < result["lora"]["base"]["nf4_bytes"] < linear * 0.75 + embedded + 200_000


def test_a_recipe_that_trains_nothing_is_refused(recipe: Path) -> None:
    done = run(recipe, str(recipe.with_name("base.toml")))
    assert done.returncode == 2
    assert "expected a stage that trains" in done.stderr and not done.stdout


ADAPTED = """
name = "adapted"
[stage.base]
kind = "checkpoint"
folder = "source"
[stage.medical]
kind = "lora"
base = "base"
r = 4
data = [{ files = "chats.jsonl" }]
batch_tokens = 256
"""


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    """A recipe without a pretraining: it adapts a tiny model that others made."""
    llama_3(tmp_path / "source")
    chats = [
        {"prompt": f"What do {number} lungs do?", "response": "They breathe. " * (1 + 5 * (number % 4 == 0))}
        for number in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "recipe.toml").write_text(ADAPTED)
    return tmp_path / "recipe.toml"


def test_a_training_of_an_adapter_is_measured_as_the_recipe_has_it(adapted: Path) -> None:
    store = Store(adapted.parent / "cache")
    workload = Workload.model_validate_json(
        json.dumps(recipe_job(load_recipe(adapted), store, seconds=0.1, compiled=False, only=["pace"]).workload)
    )
    assert workload.adapter is not None and workload.adapter["r"] == 4
    assert (workload.context, workload.rows, workload.architecture.context) == (64, 4, 128)  # of the chats, and of the model
    found = measure_stockpot_step(workload, seconds=0.05, group=ProcessGroup())
    assert found["flops_per_second"] > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_stock_peft_computes_the_loss_that_ours_does_on_packed_chats(adapted: Path, tmp_path: Path) -> None:
    job = model_job(
        adapted.parent / "source", load_recipe(adapted), Store(tmp_path / "c"), seconds=0.1, compiled=False, only=["lora"]
    )
    workload = _with_model(job, Workload.model_validate_json(json.dumps(job.workload)), tmp_path)
    ours = StockpotTraining(workload, build_learning_model(workload), group=ProcessGroup())
    first = next(batch for parts, _ in ours.prepared for batch in parts if int(batch.documents.max()) > 0)  # chats share a row
    steps = stock_steps(workload, ours.runtime.micro_batch, device=torch.device("cpu"))
    stock = PeftTraining(workload, steps=steps, precision="fp32", device=torch.device("cpu"))
    assert ours.loss(first) == pytest.approx(stock.loss(first), rel=1e-4)
    before = stock.loss(first)
    for _ in range(5):
        ours.step()
        stock.step()
    assert stock.loss(first) < before and ours.loss(first) < before


@pytest.mark.long
def test_an_adapter_of_a_model_in_a_folder_is_compared_with_stock_peft(adapted: Path) -> None:
    source = str(adapted.parent / "source")
    done = run(adapted, str(adapted), "--only", "lora", "--model", source, "--seconds", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["peft"]
    assert found["first_loss"]["ours"] == pytest.approx(found["first_loss"]["transformers"], rel=1e-3)
    for one in found["candidates"].values():
        assert one["tokens_per_second"] > 0 and one["peak_memory_bytes"] > 0


@pytest.mark.long
def test_decoding_of_a_model_in_a_folder_is_compared_with_transformers_and_llama_cpp(adapted: Path, tmp_path: Path) -> None:
    source = llama_3(tmp_path / "long", max_position_embeddings=640)
    done = run(adapted, "--only", "decode", "--model", str(source), "--seconds", "0.1", "--json", "--no-compile")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["decode_model"]
    assert set(found["candidates"]) == {"ours", "transformers", "llama_cpp_bf16", "llama_cpp_q8_0"}
    assert all(one["prefill_tokens_per_second"] > 0 and one["rounds"] for one in found["candidates"].values())


def test_overrides_without_a_recipe_are_refused(recipe: Path) -> None:
    done = run(recipe, "--set", "stage.base.seed=1")
    assert done.returncode == 2 and "expected a RECIPE" in done.stderr


def test_an_unknown_measurement_is_refused_and_the_known_ones_are_listed() -> None:
    assert chosen(None) == ["matmul", "train", "decode", "memory", "machinery"]
    assert chosen("decode,train") == ["train", "decode"]
    assert chosen("processes,train") == ["train", "processes"]
    with pytest.raises(
        RecipeError,
        match=r"expected some of matmul,train,decode,memory,machinery,.*,lora,head,context,learning, got 'speed'",
    ):
        chosen("train,speed")


def test_learning_needs_a_recipe_whose_tokens_are_in_the_cache(recipe: Path) -> None:
    assert chosen("learning") == ["learning"]
    with pytest.raises(RecipeError, match="learning: expected a RECIPE"):
        reference_job(seconds=1.0, compiled=False, only=["learning"])
    done = run(recipe, str(recipe), "--only", "learning")
    assert done.returncode == 2 and "--until tokens` makes them" in done.stderr


@pytest.mark.long
def test_one_process_and_two_are_measured_in_turns_on_the_same_step(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = recipe_job(load_recipe(recipe), Store(recipe.parent / "cache"), seconds=0.1, compiled=False, only=["processes"])
    found = measure(replace(job, workload={**job.workload, "cores": 2}))
    candidates = found["processes"]["candidates"]
    assert {name: one["processes"] for name, one in candidates.items()} == {"one": 1, "ddp": 2, "fsdp": 2}
    for one in candidates.values():
        quotients = [a / b for a, b in zip(candidates["one"]["rounds"], one["rounds"], strict=True)]
        assert min(quotients) <= one["share_of_one"] <= max(quotients)
    assert candidates["one"]["share_of_one"] == 1
    show(found)
    printed = capfd.readouterr().out
    assert "2 processes, fsdp" in printed and f"{candidates['ddp']['tokens_per_second']:,.0f}" in printed
    with pytest.raises(StageError):
        measure(replace(job, workload={**job.workload, "cores": 1}))


def test_a_batch_without_a_row_is_refused(recipe: Path) -> None:
    small = load_recipe(recipe, ["stage.base.batch_tokens=31"])
    with pytest.raises(RecipeError, match=r"stage\.base\.batch_tokens: expected at least one row of 32 tokens, got 31"):
        recipe_job(small, Store(recipe.parent / "cache"), seconds=1.0, compiled=False, only=["train"])


def test_a_failed_worker_is_an_error_and_its_messages_are_above(capfd: pytest.CaptureFixture[str]) -> None:
    job = replace(reference_job(seconds=1.0, compiled=False, only=["train"]), workload={"vocab_size": "many"})
    with pytest.raises(StageError, match="its worker ended with exit code 1"):
        measure(job)
    assert "vocab_size" in capfd.readouterr().err


def test_a_terminated_bench_leaves_no_folder_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runner.cli", "bench", "--only", "matmul", "--json"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None and process.stdout is not None
        assert any("matrix products" in line for line in process.stderr)
        assert list(tmp_path.glob("stockpot-bench-*"))
        process.terminate()
        assert process.wait() == 130
        assert process.stdout.read() == ""
    assert not list(tmp_path.glob("stockpot-bench-*"))


def test_the_process_that_shows_the_table_imports_no_torch() -> None:
    code = "import sys, runner.diagnostics.bench; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

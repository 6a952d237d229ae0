"""The kind `lora`: from a checkpoint and rows to an adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from random_model import random_model
from safetensors.torch import load_file

from llm.adapters import lora
from llm.data.batch import collate
from llm.data.packing import PackedRows
from llm.errors import InputError, Interrupted
from llm.models.checkpoint import load_checkpoint
from llm.training.loss import next_token_loss
from runner.artifacts import Adapter
from runner.input_files import InputFile
from runner.stage import Context
from runner.stages.lora import TrainAdapter

ROWS = [{"text": f"the heart {number}", "label": "organ"} for number in range(24)]


@pytest.fixture
def context_of(tmp_path: Path, make_context: Callable[..., Context]) -> Callable[..., Context]:
    """Contexts over one base model, which has learned nothing yet."""
    sizes = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 32}
    random_model(tmp_path / "base", ["the heart organ"], **sizes)

    def make(name: str = "stage", **changes: Any) -> Context:
        return make_context(name, inputs={"base": tmp_path / "base"}, **changes)

    return make


def stage_of(folder: Path, **changes: Any) -> TrainAdapter:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    fields = {
        "base": "base",
        "data": [{"files": InputFile("rows.jsonl", folder), "prompt": "What?\n{text}", "response": "{label}"}],
        "batch_tokens": 128,
        "budget": {"steps": 10},
        "schedule": {"learning_rate": 1e-2},
        "r": 4,
        "dropout": 0.1,
        "seed": 1,
    }
    return TrainAdapter.model_validate(fields | changes)


def losses(context: Context) -> list[float]:
    return [line["loss"] for line in context.report.lines if "loss" in line]  # type: ignore[attr-defined]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_adapter_learns_and_its_base_does_not_change(
    quantize: str | None, context_of: Callable[..., Context], tmp_path: Path
) -> None:
    context = context_of()
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    stage = stage_of(tmp_path, quantize=quantize, budget={"steps": 30}, validation=stage_of(tmp_path).data)
    stage.prepare(context)
    metrics = stage.run(context)
    assert losses(context)[-1] < losses(context)[0] - 1
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == weights
    assert {path.name for path in Adapter(context.work).content() if ".work" not in path.parts} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    # q, o: 64 + 64; k, v: 64 + 32; gate, up, down: 64 + 192; each times the rank, in 2 layers
    assert metrics["trained_parameters"] == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 256)
    assert metrics["data"]["learned_tokens"] >= 2 * len(ROWS)

    model = load_checkpoint(tmp_path / "base")
    lora.load_adapter(model, context.work)  # also over the full weights it answers as it was taught


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_interrupted_training_of_an_adapter_ends_where_an_uninterrupted_one_ends(
    quantize: str | None, context_of: Callable[..., Context], tmp_path: Path
) -> None:
    stage = stage_of(tmp_path, quantize=quantize)
    whole = context_of("whole")
    stage.prepare(whole)
    stage.run(whole)

    asked: list[None] = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) == 5

    stage.prepare(context_of("halted"))
    with pytest.raises(Interrupted):
        stage.run(context_of("halted", should_stop=should_stop))
    resumed = context_of("halted")
    (checkpoint,) = (resumed.scratch / "checkpoints").iterdir()
    assert all("lora_" in name for name in load_file(checkpoint / "weights.safetensors"))  # the base is not in it
    stage.run(resumed)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (resumed.work / name).read_bytes() == (whole.work / name).read_bytes()


def test_validation_does_not_change_training_over_four_bits(context_of: Callable[..., Context], tmp_path: Path) -> None:
    held_out = stage_of(tmp_path).data
    found = []
    for every in (None, 2):
        context = context_of(str(every))
        stage = stage_of(tmp_path, quantize="nf4", validation=held_out, validate_every=every)
        stage.prepare(context)
        metrics = stage.run(context)
        found.append((losses(context), (context.work / "adapter_model.safetensors").read_bytes()))
    assert found[0] == found[1]
    # Three are told: over the base in four bits, merged into the full weights, and into what the four bits stand for.
    found_losses = metrics["merge_losses"]
    full = load_checkpoint(tmp_path / "base")
    lora.load_adapter(full, context.work)
    rows = PackedRows(context.scratch / "validation-rows", seed=None)
    batch = collate([rows.row(index) for index in range(rows.rows_per_epoch)], range(rows.rows_per_epoch))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=metrics["choices"]["precision"] == "bf16"):
        total, count, *_ = next_token_loss(full, batch)
    assert found_losses["merged"] == pytest.approx(float(total / count), rel=1e-2)
    assert found_losses["unmerged"] == metrics["validation_loss"] != found_losses["merged"]
    # The same weights as unmerged, but for rounding; the full ones are further away.
    assert found_losses["merged_dequantized"] == pytest.approx(found_losses["unmerged"], rel=5e-3)


def test_muon_is_refused_for_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"optimizer\n.*kind: expected \"adamw\", got 'muon'"):
        stage_of(tmp_path, optimizer={"kind": "muon"})


def test_an_adapter_of_the_head_has_no_dropout(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r'expected dropout = 0 with "lm_head"'):
        stage_of(tmp_path, target_modules=["lm_head"], dropout=0.1)
    assert stage_of(tmp_path, target_modules=["lm_head"], dropout=0.0).target_modules == ["lm_head"]


def test_a_wrong_target_is_refused_with_the_right_names(context_of: Callable[..., Context], tmp_path: Path) -> None:
    stage = stage_of(tmp_path, target_modules=["q_proj", "query"])
    stage.prepare(context_of())
    with pytest.raises(InputError, match=r"target_modules: expected names of down_proj, .*got 'query'"):
        stage.run(context_of())

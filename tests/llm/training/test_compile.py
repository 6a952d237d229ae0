"""torch.compile: when it is chosen, and that a compiled training learns the same and resumes bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import MadeUpRows, tiny_model, tiny_training
from torch import Tensor

from llm.adapters import lora
from llm.device import has_compiler
from llm.errors import Interrupted
from llm.models.decoder.model import Decoder, Layer
from llm.training.config import Budget
from llm.training.runtime import COLD_SECONDS, SAVED, SPEED, WARM_SECONDS, compiled_note, note_compiled, resolve_compile
from llm.training.validation import Validation

# Batches of two rows throughout, of which none is left over: a layer is compiled anew for another number.
TWO_ROWS: dict[str, Any] = {
    "micro_batch": 2,
    "batch_tokens": 4 * 24,
    "validation": Validation(MadeUpRows(rows_per_epoch=4, seed=9, bytes_per_token=3.0)),
}
pytestmark = [
    pytest.mark.usefixtures("compiled_code"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo looks at it
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo does
]


def weights(model: Decoder) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def stop_after(steps: int) -> Any:
    calls = iter(range(10**6))
    return lambda: next(calls) > steps


def adapted() -> Decoder:
    model = tiny_model()
    lora.attach(model, lora.LoraConfig(r=4, alpha=8, dropout=0.1), seed=1)
    return model


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: tiny_model(dropout=0.1), id="all weights"),
        pytest.param(adapted, id="adapter", marks=pytest.mark.long),
    ],
)
def test_a_compiled_training_learns_what_an_ordinary_one_does(make: Any, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        model, lines = make(), []  # type: ignore[var-annotated]
        metrics = tiny_training(
            model, tmp_path / str(compiled), budget=Budget(steps=6), compiled=compiled, lines=lines, **TWO_ROWS
        )
        assert metrics["choices"]["compiled"] is compiled
        assert not [line for line in lines if "does not work" in line.get("note", "")]
        found.append((weights(model), metrics["validation_loss"]))
    for name, weight in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], weight, atol=2e-4, rtol=0, msg=name)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-4)


def test_a_compiled_training_that_was_stopped_ends_bit_for_bit_where_another_does(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"budget": Budget(steps=6), "compiled": True, **TWO_ROWS}
    whole = tiny_model(dropout=0.1)
    tiny_training(whole, tmp_path / "whole", **changes)
    with pytest.raises(Interrupted):
        tiny_training(tiny_model(dropout=0.1), tmp_path / "parts", **changes, should_stop=stop_after(7))
    resumed, lines = tiny_model(dropout=0.1), []  # type: ignore[var-annotated]
    metrics = tiny_training(resumed, tmp_path / "parts", **changes | {"compiled": "auto"}, lines=lines)
    assert any("continues from step" in line.get("note", "") for line in lines)
    assert metrics["choices"]["compiled"] is True  # what was decided first stays
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_compiled_layers_can_be_recomputed(tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        model = tiny_model(dropout=0.1)
        model.recompute = recompute
        tiny_training(model, tmp_path / str(recompute), budget=Budget(steps=3), compiled=True, **TWO_ROWS)
        found.append(weights(model))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-6, rtol=0, msg=name)


def test_auto_compiles_where_it_pays_and_sooner_where_the_cache_is_warm() -> None:
    if not has_compiler("cpu"):
        pytest.fail("this test: expected a C++ compiler")
    pays_cold = 1.01 * COLD_SECONDS["cpu"] * SPEED["cpu"] / SAVED["cpu"]
    pays_warm = 1.01 * WARM_SECONDS["cpu"] * SPEED["cpu"] / SAVED["cpu"]
    assert resolve_compile("auto", device="cpu", flops=pays_cold, shape="new")
    assert not resolve_compile("auto", device="cpu", flops=pays_warm, shape="new")
    note_compiled("new")
    assert resolve_compile("auto", device="cpu", flops=pays_warm, shape="new")
    assert not resolve_compile("auto", device="cpu", flops=pays_warm, shape="another")
    path = compiled_note("new")
    assert path is not None and path.exists()


def test_a_training_that_was_compiled_is_known_as_warm_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is = (Layer.before_attention, Layer.after_attention)  # saves compiling: what is tested is the choice
    monkeypatch.setattr("llm.models.decoder.model._compiled_halves", lambda: as_it_is)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setitem(WARM_SECONDS, "cpu", 0.0)  # any training pays where the cache is warm, and none where it is cold
    changes: dict[str, Any] = {"budget": Budget(steps=2), **TWO_ROWS}
    chosen = [
        tiny_training(tiny_model(), tmp_path / str(number), compiled=compiled, **changes)["choices"]["compiled"]
        for number, compiled in enumerate(("auto", True, "auto"))
    ]
    assert chosen == [False, True, True]


def test_without_a_compiler_auto_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shutil.which("g++") or shutil.which("clang++")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not resolve_compile("auto", device="cpu", flops=1e30, shape="any")


def test_what_a_recipe_says_of_compiling_is_followed() -> None:
    assert resolve_compile(True, device="cpu", flops=1.0, shape="any")
    assert not resolve_compile(False, device="cpu", flops=1e30, shape="any")


def test_where_compiling_fails_training_goes_on_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no such compiler: q++\nand a long story")

    monkeypatch.setattr("llm.models.decoder.model._compiled_halves", lambda: (fails, fails))
    lines: list[dict[str, Any]] = []
    metrics = tiny_training(tiny_model(), tmp_path, budget=Budget(steps=2), compiled=True, lines=lines)
    assert metrics["choices"]["compiled"] is False
    assert [line for line in lines if line.get("note", "").endswith("goes on without it: no such compiler: q++")]

"""The training loop: what is learned depends on rows, settings and seed, and on nothing else."""

import errno
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import VOCABULARY, MadeUpRows, tiny_model, tiny_training
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llm.data.batch import IGNORE, Batch, PackedRow, collate
from llm.errors import InputError, Interrupted
from llm.files import write_tensors
from llm.training import checkpoint
from llm.training.config import Budget, Optimizer
from llm.training.loss import cross_entropy_sum, next_token_loss
from llm.training.preflight.sanity_check import NEAR, sanity_check
from llm.training.task import CHECKPOINTS


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], **tolerance: float) -> None:
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def stop_after(calls: int) -> Callable[[], bool]:
    """A `should_stop` that is true at the last of `calls` calls; the loop calls it before each batch, also of validation."""
    asked = iter([False] * (calls - 1) + [True])
    return lambda: next(asked, False)


def test_a_training_learns(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    metrics = tiny_training(tiny_model(), tmp_path, lines=lines, budget=Budget(steps=80))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 3.0 and losses[-1] < 2.0  # chance is ln 40 = 3.7
    assert metrics["validation_loss"] < 2.0
    assert metrics["validation_perplexity"] == pytest.approx(math.exp(metrics["validation_loss"]))
    assert metrics["tokens"] == 80 * 5 * 24


def test_steps_that_take_long_are_shown_one_by_one_and_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, shown = [], []
    for seconds in (1e9, -1.0):
        monkeypatch.setattr("llm.training.trainer.SHOW_SECONDS", seconds)
        lines: list[dict[str, Any]] = []
        model = tiny_model()
        tiny_training(model, tmp_path / str(seconds), lines=lines, budget=Budget(steps=12))
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
        shown.append([line["step"] for line in lines if line.keys() == {"step", "steps"}])
        assert [line["step"] for line in lines if "learning_rate" in line] == [10, 12]
    assert torch.equal(*weights)
    assert shown == [[], [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]]


def test_validation_loss_is_the_mean_over_all_targets(tmp_path: Path) -> None:
    model, rows = tiny_model(), MadeUpRows(rows_per_epoch=6, seed=9)
    metrics = tiny_training(model, tmp_path, micro_batch=4)
    batch = collate([rows.row(index) for index in range(6)], range(6))
    logits = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    assert metrics["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)
    nats = expected.item() * int((batch.targets != IGNORE).sum())
    assert metrics["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / (6 * 24 * 3.0), rel=1e-5)


def test_accumulation_and_micro_batch_do_not_change_an_update_of_muon(tmp_path: Path) -> None:
    """Updates of AdamW have a smaller tolerance, in `test_architectures`."""
    found = []
    for size in (5, 2, 1):
        model = tiny_model(dropout=0.1)
        settings = {"optimizer": Optimizer(kind="muon"), "micro_batch": size, "budget": Budget(steps=3)}
        tiny_training(model, tmp_path / str(size), **settings)
        found.append(weights(model))
    # Muon's iteration runs in bf16 and turns rounding of the gradient into about 1e-3 of an update of 0.02.
    for other in found[1:]:
        assert_same(found[0], other, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_training_resumes_and_ends_bit_for_bit_the_same(tmp_path: Path, kind: str, precision: str) -> None:
    settings: dict[str, Any] = {"optimizer": Optimizer.model_validate({"kind": kind}), "precision": precision}
    unstopped = tiny_model(dropout=0.1)
    expected = tiny_training(unstopped, tmp_path / "unstopped", **settings)
    stopped = tiny_model(dropout=0.1)
    with pytest.raises(Interrupted, match="after step 11 of 20"):
        tiny_training(stopped, tmp_path / "stopped", should_stop=stop_after(14), **settings)
    resumed = tiny_model(dropout=0.1)
    torch.rand(7)  # whatever state the generator is in
    found = tiny_training(resumed, tmp_path / "stopped", **settings)
    assert_same(weights(unstopped), weights(resumed), atol=0, rtol=0)
    for name in ("loss", "validation_loss", "best_validation_loss", "best_validation_step", "tokens", "targets"):
        assert found[name] == expected[name], name


@pytest.mark.parametrize(
    ("calls", "step"),
    # A step asks 5 times and a validation, after steps 8, 16 and 20, 6 times.
    [(3, 0), (40 + 3, 8), (40 + 6 + 5 + 2, 9), (100 + 12 + 3, 20)],
)
def test_a_training_stopped_inside_a_step_or_a_validation_ends_the_same(tmp_path: Path, calls: int, step: int) -> None:
    unstopped, resumed = tiny_model(dropout=0.1), tiny_model(dropout=0.1)
    whole: list[dict[str, Any]] = []
    expected = tiny_training(unstopped, tmp_path / "unstopped", lines=whole, micro_batch=1)
    lines: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"lines": lines, "micro_batch": 1}
    with pytest.raises(Interrupted, match=f"after step {step} of 20"):
        tiny_training(tiny_model(dropout=0.1), tmp_path / "stopped", should_stop=stop_after(calls), **settings)
    found = tiny_training(resumed, tmp_path / "stopped", **settings)
    assert_same(weights(unstopped), weights(resumed), atol=0, rtol=0)
    assert [line for line in lines if "validation_loss" in line] == [line for line in whole if "validation_loss" in line]
    for name in ("loss", "validation_loss", "best_validation_loss", "best_validation_step", "tokens", "targets"):
        assert found[name] == expected[name], name


def test_a_training_that_fails_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    class Failing(MadeUpRows):
        def row(self, index: int) -> PackedRow:
            if index >= 5 * 13:
                raise OSError("the disk went away")
            return super().row(index)

    unstopped, resumed = tiny_model(), tiny_model()
    tiny_training(unstopped, tmp_path / "unstopped")
    with pytest.raises(OSError, match="went away"):
        tiny_training(tiny_model(), tmp_path / "failed", rows=Failing(), every=5)
    lines: list[dict[str, Any]] = []
    tiny_training(resumed, tmp_path / "failed", lines=lines)
    assert "continues from step 10 of 20" in [line.get("note") for line in lines]
    assert_same(weights(unstopped), weights(resumed), atol=0, rtol=0)


def test_a_full_disk_leaves_the_checkpoint_before_and_no_partial_one(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "full" / CHECKPOINTS

    def full_after_the_first() -> bool:
        if (folder / "step-00000005").exists():  # the weights still fit, the optimizer's state does not
            size = (folder / "step-00000005" / "weights.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return False

    try:
        with pytest.raises(OSError, match=r"File too large.*optimizer\.safetensors"):
            tiny_training(tiny_model(), tmp_path / "full", every=5, should_stop=full_after_the_first)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    unstopped, resumed = tiny_model(), tiny_model()
    tiny_training(unstopped, tmp_path / "unstopped")
    lines: list[dict[str, Any]] = []
    tiny_training(resumed, tmp_path / "full", lines=lines)
    assert "continues from step 5 of 20" in [line.get("note") for line in lines]
    assert_same(weights(unstopped), weights(resumed), atol=0, rtol=0)


def test_checkpoints_by_the_clock_do_not_change_what_is_learned(tmp_path: Path) -> None:
    often, never = tiny_model(), tiny_model()
    metrics = tiny_training(often, tmp_path / "often", minutes=1e-9)
    assert metrics["loss"] == tiny_training(never, tmp_path / "never")["loss"]
    assert_same(weights(often), weights(never), atol=0, rtol=0)
    assert [path.name for path in sorted((tmp_path / "often" / CHECKPOINTS).iterdir())] == ["step-00000019", "step-00000020"]
    assert not (tmp_path / "never" / CHECKPOINTS).exists()


def damage(file: Path) -> None:
    kept = file.read_bytes()
    file.write_bytes(kept[:-20] + bytes([kept[-20] ^ 1]) + kept[-19:])


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, name: str) -> None:
    unstopped, resumed = tiny_model(), tiny_model()
    tiny_training(unstopped, tmp_path, every=5, budget=Budget(steps=20))
    last, before = tmp_path / CHECKPOINTS / "step-00000020", "step-00000015"
    damage(last / name)
    lines: list[dict[str, Any]] = []
    tiny_training(resumed, tmp_path, lines=lines)
    notes = [line["note"] for line in lines if "note" in line]
    assert notes == [
        f"checkpoint {last.name} is damaged and removed: goes on from {before}",
        "continues from step 15 of 20",
    ]
    assert_same(weights(unstopped), weights(resumed), atol=0, rtol=0)


def test_a_checkpoint_made_after_damaged_ones_is_kept(tmp_path: Path) -> None:
    tiny_training(tiny_model(), tmp_path, every=5)
    for last in (tmp_path / CHECKPOINTS).iterdir():
        damage(last / "state.json")
    (tmp_path / CHECKPOINTS / "step-00000007.tmp").mkdir()
    with pytest.raises(Interrupted, match="after step 3"):
        tiny_training(tiny_model(), tmp_path, should_stop=stop_after(4))
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000003"]


def test_writing_a_checkpoint_never_removes_it(tmp_path: Path) -> None:
    model = tiny_model()
    for step in (10, 11, 3):
        written = checkpoint.write(tmp_path, checkpoint.take(model, [], facts={"step": step}), kept=2)
        assert written.exists()


def test_a_writer_leaves_partial_checkpoints_of_others_alone(tmp_path: Path) -> None:
    """With a rollback, the main process writes step 0 before any process has waited for another."""
    written = tmp_path / "step-00000000.tmp"
    written.mkdir()
    with checkpoint.Writer(tmp_path, kept=1):
        assert written.exists()
    checkpoint.remove_partial(tmp_path)
    assert not written.exists()


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*model\.safetensors") as caught:
            write_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(2**19)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_threads_are_kept_and_another_number_of_processes_is_noted(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        tiny_training(tiny_model(), tmp_path, should_stop=stop_after(2), cores=1)
    metrics = tiny_training(tiny_model(), tmp_path, cores=2, should_stop=lambda: False, budget=Budget(steps=4))
    assert metrics["choices"]["threads"] == 1

    with pytest.raises(Interrupted):
        tiny_training(tiny_model(), tmp_path / "two", should_stop=stop_after(2))
    (state,) = (tmp_path / "two" / CHECKPOINTS).glob("*/state.json")
    facts = json.loads(state.read_text())["facts"]
    facts["choices"] |= {"processes": 2, "strategy": "ddp"}
    model = tiny_model()
    kept = checkpoint.read(state.parent)
    checkpoint.write(state.parent.parent, replace(kept, facts=facts), kept=2)
    lines: list[dict[str, Any]] = []
    tiny_training(model, tmp_path / "two", lines=lines)
    assert any("began with 2 processes (ddp) on cpu, goes on with 1 process on cpu" in line.get("note", "") for line in lines)


def test_epochs_are_counted_and_a_step_of_more_than_one_is_noted(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    metrics = tiny_training(tiny_model(), tmp_path / "few", lines=lines, rows=MadeUpRows(rows_per_epoch=4))
    assert metrics["epochs"] == 20 * 5 / 4
    assert lines[0]["note"].startswith("the data has 4 rows and a step 5") and "batch_tokens = 96" in lines[0]["note"]
    assert tiny_training(tiny_model(), tmp_path / "many")["epochs"] == pytest.approx(20 * 5 / 64, abs=1e-4)


def test_recomputed_layers_learn_the_same(tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        model = tiny_model(dropout=0.1)
        model.recompute = recompute
        tiny_training(model, tmp_path / str(recompute), budget=Budget(steps=3))
        found.append(weights(model))
    assert_same(*found, atol=1e-6, rtol=0)


def test_the_largest_seed_of_toml_can_be_used(tmp_path: Path) -> None:
    tiny_training(tiny_model(dropout=0.1), tmp_path, seed=2**63 - 1, budget=Budget(steps=2))


def test_validation_computes_no_gradient_of_the_head() -> None:
    head = torch.nn.Linear(16, VOCABULARY, bias=False)
    hidden, targets = torch.randn(50, 16), torch.randint(VOCABULARY, (50,))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cross_entropy_sum(head, hidden, targets)
    assert counter.get_total_flops() == 2 * 50 * 16 * VOCABULARY


def test_the_runtime_is_restored_from_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        tiny_training(tiny_model(), tmp_path, precision="bf16", micro_batch=3, should_stop=stop_after(2))
    metrics = tiny_training(tiny_model(), tmp_path, precision="auto", micro_batch="auto")
    assert metrics["choices"]["precision"] == "bf16" and metrics["choices"]["micro_batch"] == 3


def test_muon_multiplies_in_what_the_machine_is_fast_at_and_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    muon = {"optimizer": Optimizer(kind="muon"), "precision": "bf16"}
    with pytest.raises(Interrupted):
        tiny_training(tiny_model(), tmp_path, **muon, should_stop=stop_after(2))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    metrics = tiny_training(tiny_model(), tmp_path, **muon)
    assert metrics["choices"]["muon_precision"] == "fp32"
    assert tiny_training(tiny_model(), tmp_path / "fast", **muon)["choices"]["muon_precision"] == "bf16"


def test_a_loss_that_is_not_finite_ends_the_training_with_its_step(tmp_path: Path) -> None:
    def breaks(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        total, count, *_ = next_token_loss(model, batch)
        breaks.calls += 1  # type: ignore[attr-defined]  # two before the first step, to see what fits, and one per step
        return total * (math.nan if breaks.calls == 16 else 1.0), count  # type: ignore[attr-defined]

    breaks.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"step 13: loss nan, gradient norm nan, learning rate 0\.00"):
        tiny_training(tiny_model(), tmp_path, objective=breaks, every=4, validation=None)
    kept = sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir())
    assert kept == ["step-00000008", "step-00000012"]


def test_a_batch_smaller_than_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"batch_tokens: expected at least one row of 24 tokens .* got 23"):
        tiny_training(tiny_model(), tmp_path, batch_tokens=23)


def test_the_fused_loss_equals_cross_entropy_in_value_and_gradients() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 16, requires_grad=True), torch.nn.Linear(16, VOCABULARY, bias=False)
    targets = torch.randint(VOCABULARY, (50,))
    targets[::3] = IGNORE
    wrapped = torch.nn.Sequential(head)
    wrapped.out_features = VOCABULARY  # type: ignore[assignment]
    found = []
    for module in (head, wrapped):  # fused, and as for a head that an adapter wraps
        total = cross_entropy_sum(module, hidden, targets)
        found.append((total, *torch.autograd.grad(total * 0.5, (hidden, head.weight))))
    total = torch.nn.functional.cross_entropy(head(hidden), targets, ignore_index=IGNORE, reduction="sum")
    expected = (total, *torch.autograd.grad(total * 0.5, (hidden, head.weight)))
    for values in found:
        for value, wanted in zip(values, expected, strict=True):
            torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)


def test_the_sanity_check_does_not_change_a_training(tmp_path: Path) -> None:
    found, notes = [], []
    for check in (False, True):
        model, lines = tiny_model(), []
        budget = Budget(steps=200)
        metrics = tiny_training(model, tmp_path / str(check), lines=lines, check=check, budget=budget, validation=None)
        notes.append([line["note"] for line in lines if "note" in line])
        found.append(weights(model))
    assert_same(*found, atol=0, rtol=0)
    assert notes[0] == [] and notes[1][0].startswith("self-check passed")
    assert metrics["self_check"]["first_loss"] == pytest.approx(math.log(VOCABULARY), abs=NEAR)


def some_batch() -> Batch:
    return collate([MadeUpRows().row(index) for index in range(4)], range(4))


def test_the_sanity_check_refuses_a_model_that_cannot_learn() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)
    with pytest.raises(InputError, match=r"first loss: expected to be near ln\(vocabulary\) = 3.69"):
        sanity_check(model, next_token_loss, some_batch(), precision="fp32")

    def deaf(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        total, count, *_ = next_token_loss(model, batch)
        return total.detach() * 0 + model.model.norm.weight.sum() * 0 + 5.5 * count, count

    large = tiny_model()
    large.vocab_size = 300
    large.lm_head = torch.nn.Linear(32, 300, bias=False)
    with pytest.raises(InputError, match=r"loss on one batch: expected less than 5\.0"):
        sanity_check(large, deaf, some_batch(), precision="fp32")


def test_the_sanity_check_learns_several_rows_with_the_backward_pass_outside_autocast() -> None:
    seen: list[tuple[int, bool, bool]] = []

    def watched(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        total, count, *_ = next_token_loss(model, batch)
        forward = torch.is_autocast_enabled("cpu")
        total.register_hook(lambda grad: seen.append((len(batch.tokens), forward, torch.is_autocast_enabled("cpu"))))
        return total, count

    model = tiny_model()
    model.vocab_size, model.lm_head = 300, torch.nn.Linear(32, 300, bias=False)  # chance is above the loss it has to reach
    found = sanity_check(model, watched, some_batch(), precision="bf16")
    assert found["overfit_loss"] < 5 < found["first_loss"]
    assert set(seen) == {(4, True, False)}


def test_a_micro_batch_that_does_not_fit_is_halved_and_learns_the_same(tmp_path: Path) -> None:
    """Memory really runs out: the process may take only a little more than it has."""
    program = """
import json, resource, sys
from pathlib import Path
from llm.training.config import Budget
from tests.support.models.tiny_training import MadeUpRows, tiny_model, tiny_training

folder, room = Path(sys.argv[1]), 48 * 2**20
model = tiny_model(hidden_size=64, layers=4, heads=4, context=256)
# Whatever torch and threads take once, they have taken.
tiny_training(tiny_model(), folder / "first", budget=Budget(steps=1), batch_tokens=64 * 24)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
rows = MadeUpRows(context=256)
changes = dict(rows=rows, validation=None, batch_tokens=64 * 256, micro_batch="auto", budget=Budget(steps=2))
metrics = tiny_training(model, folder / "second", **changes)
print(json.dumps({"micro_batch": metrics["choices"]["micro_batch"], "loss": metrics["loss"]}))
"""
    # Of the room, which is one of addresses, each thread would reserve 72 MiB for its heap and stack, and uses a few KiB.
    command = ["prlimit", f"--stack={2**21}:", sys.executable, "-c", program, str(tmp_path / "narrow")]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    narrow = json.loads(done.stdout.splitlines()[-1])
    model, rows = tiny_model(hidden_size=64, layers=4, heads=4, context=256), MadeUpRows(context=256)
    changes: dict[str, Any] = {"rows": rows, "validation": None, "batch_tokens": 64 * 256, "budget": Budget(steps=2)}
    wide = tiny_training(model, tmp_path / "wide", micro_batch="auto", **changes)
    assert narrow["micro_batch"] < wide["choices"]["micro_batch"]
    assert narrow["loss"] == pytest.approx(wide["loss"], abs=1e-5)


def test_memory_that_runs_out_during_training_halves_the_micro_batch(tmp_path: Path) -> None:
    def takes(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.rows.numel() > 2 and takes.calls > 4:  # type: ignore[attr-defined]
            torch.empty(2**60, dtype=torch.uint8)  # the allocator's own error
        takes.calls += 1  # type: ignore[attr-defined]
        return next_token_loss(model, batch)

    found = []
    for objective in (next_token_loss, takes):
        takes.calls = 0  # type: ignore[attr-defined]
        model, lines = tiny_model(dropout=0.1), []  # type: ignore[var-annotated]
        metrics = tiny_training(
            model, tmp_path / objective.__name__, objective=objective, budget=Budget(steps=5), validation=None, lines=lines
        )
        found.append(weights(model))
    assert metrics["choices"]["micro_batch"] == 2
    assert [line["note"] for line in lines if "memory ran out at step 3" in line.get("note", "")]
    assert_same(*found, atol=1e-6, rtol=0)


def test_a_fixed_micro_batch_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    def takes(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        torch.empty(2**60, dtype=torch.uint8)
        return next_token_loss(model, batch)

    with pytest.raises(InputError, match=r'micro_batch = 3 rows of 24 positions; micro_batch = "auto" finds'):
        tiny_training(tiny_model(), tmp_path, objective=takes, micro_batch=3)
    with pytest.raises(InputError, match="a single row of 24 positions; recompute = true"):
        tiny_training(tiny_model(), tmp_path, objective=takes, micro_batch="auto")

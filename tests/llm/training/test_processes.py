"""Real groups of processes over gloo, started as a run starts them, learn what one process does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import run_case, save_tiny_base, tiny_model, tiny_preferences, tiny_training

from llm.adapters import lora
from llm.errors import InputError
from llm.training.distributed.fsdp import shard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loss import Learner, next_token_loss

SUPPORT = Path(__file__).parents[2] / "support" / "models"

STEPS = 12
ENOUGH = 1e-3  # between losses of the same training in fp32
ENOUGH_BF16 = 1e-2  # in bf16, where another micro-batch alone changes them by up to 0.8 of this


# Without --multi_gpu one process is started whatever is asked for (accelerate 1.15).
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--num_cpu_threads_per_process", "1", "--multi_gpu", "--main_process_port", "0", "--num_processes"]


def launch(
    folder: Path, processes: int, cases: dict[str, dict[str, Any]], *, dies: bool = False, accelerate: bool = False
) -> dict[str, list[Any]]:
    """The results of each process of a group, by case; the processes are forked, or started by accelerate as those with
    GPUs."""
    command = [sys.executable, *([*ACCELERATE, str(processes)] if accelerate else []), str(SUPPORT / "tiny_training.py")]
    command += [str(folder), json.dumps(cases), *([] if accelerate else [str(processes)])]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == dies, done.stderr[-4000:]
    left = {name: [folder / f"{name}.{rank}.json" for rank in range(processes)] for name in cases}
    return {name: [json.loads(path.read_text()) for path in paths] for name, paths in left.items() if paths[0].exists()}


def assert_same_curve(first: list[dict[str, Any]], second: list[dict[str, Any]], *, within: float = ENOUGH) -> None:
    curves = [[line for line in lines if "note" not in line] for lines in (first, second)]
    for one, other in zip(*curves, strict=True):
        for name in ("loss", "validation_loss", "validation_loss/second", "gradient_norm"):
            # A norm, whose rounding grows with it, is compared with the norm itself.
            bound = within * (max(1.0, other.get(name, 0.0)) if name == "gradient_norm" else 1.0)
            assert one.get(name) == pytest.approx(other.get(name), abs=bound), (name, one["step"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


MUON = {"steps": STEPS, "strategy": "fsdp", "optimizer": "muon"}
KILLED = MUON | {"scratch": "killed", "every": 5, "objective": "killed"}
LEARNING = {  # alerts that change what is learned, of a training whose gradient spikes at step 25
    action: {"steps": 32, "every": 10, "alerts": {"gradient_norm": {"action": action, "back": 4}}}
    for action in ("skip", "rollback")
}
SPARE = {"steps": STEPS, "strategy": "ddp", "objective": "spare", "find_unused_parameters": True}

STABLE = MUON | {"schedule": {"kind": "constant", "learning_rate": 1e-2, "warmup_steps": 3}}
TRUNK = STABLE | {"steps": 5, "leave_in": "trunk"}
REST = STABLE | {"strategy": "ddp", "start_from": "trunk"}


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    cases = {
        "plain": {"steps": STEPS},
        "weighted": {"steps": STEPS, "weighted": True},
        "muon": MUON,
        "spare": SPARE,
        "stable": STABLE,
        **LEARNING,
    }
    return {name: run_case(folder, case | {"scratch": f"one-{name}"}) for name, case in cases.items()}


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Any]]:
    cases: dict[str, dict[str, Any]] = {strategy: {"steps": STEPS, "strategy": strategy} for strategy in ("ddp", "fsdp")}
    cases |= {"shares-adamw": {"shares": "adamw"}, "shares-muon": {"shares": "muon"}, "spare": SPARE, "muon": MUON}
    cases |= {"held": {"held": True}}
    for strategy in ("ddp", "fsdp"):
        cases[f"weighted-{strategy}"] = {"steps": STEPS, "strategy": strategy, "weighted": True}
        cases[f"bf16-{strategy}"] = {"steps": STEPS, "strategy": strategy, "precision": "bf16"}
        cases[f"adapter-{strategy}"] = cases[f"bf16-{strategy}"] | {"adapter": True, "model": {"tied": False}}
    cases |= {f"pairs-{strategy}": {"objective": "preferences", "strategy": strategy} for strategy in ("ddp", "fsdp")}
    cases |= {f"{action}-{how}": case | {"strategy": how} for action, case in LEARNING.items() for how in ("ddp", "fsdp")}
    cases |= {"pages": {"base": "base"}}
    save_tiny_base(folder / "base")
    (folder / "trunk").mkdir()
    return launch(folder, 2, cases | {"stable": TRUNK, "rest": REST, "killed": KILLED}, dies=True)


@pytest.fixture(scope="module")
def four(folder: Path, two: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The same trainings, and one that resumes where the two were killed."""
    shutil.copytree(folder / "killed", folder / "four")
    cases: dict[str, dict[str, Any]] = {strategy: {"steps": STEPS, "strategy": strategy} for strategy in ("ddp", "fsdp")}
    return launch(folder, 4, cases | {"four": MUON | {"strategy": "ddp"}})


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_weighted_rows_teach_several_processes_what_they_teach_one(
    one: dict[str, Any], two: dict[str, list[Any]], strategy: str
) -> None:
    """The weights of a step are summed over all processes, of which each has other rows."""
    assert_same_curve(one["weighted"]["lines"], two[f"weighted-{strategy}"][0]["lines"])
    pairs = zip(one["weighted"]["lines"], one["plain"]["lines"], strict=True)
    assert any(abs(line["loss"] - other["loss"]) > 10 * ENOUGH for line, other in pairs if "loss" in line)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_and_four_processes_learn_what_one_does(
    one: dict[str, Any], two: dict[str, list[Any]], four: dict[str, list[Any]], strategy: str
) -> None:
    """Dropout is on, and rows do not divide evenly into processes and micro-batches."""
    assert one["plain"]["metrics"]["choices"]["strategy"] == "single"
    for count, group in ((2, two), (4, four)):
        metrics = group[strategy][0]["metrics"]
        assert (metrics["choices"]["processes"], metrics["choices"]["strategy"]) == (count, strategy)
        assert metrics["targets"] == one["plain"]["metrics"]["targets"]
        assert_same_curve(one["plain"]["lines"], group[strategy][0]["lines"])
        assert len({found["digest"] for found in group[strategy]}) == 1  # the whole model, in every process


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_preferences_as_one_does(two: dict[str, list[Any]], strategy: str, tmp_path: Path) -> None:
    _, alone = tiny_preferences(tmp_path / "pairs", tmp_path / "alone", micro_batch=3)
    metrics = two[f"pairs-{strategy}"][0]["metrics"]
    assert metrics["targets"] == alone["targets"]  # pairs, which stay together
    for name in ("validation_loss", "validation_reward_margin", "validation_reward_accuracy"):
        assert metrics[name] == pytest.approx(alone[name], abs=ENOUGH)


def test_muon_with_sharded_weights_learns_what_one_process_does(one: dict[str, Any], two: dict[str, list[Any]]) -> None:
    assert_same_curve(one["muon"]["lines"], two["muon"][0]["lines"])


def test_weights_that_only_one_process_uses_learn_what_they_do_in_one(one: dict[str, Any], two: dict[str, list[Any]]) -> None:
    assert_same_curve(one["spare"]["lines"], two["spare"][0]["lines"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("action", "found"),
    [("skip", {"skipped_steps": [25]}), ("rollback", {"passed_over": [[21, 26]], "rollbacks": [25]})],
)
def test_what_an_alert_skips_is_skipped_by_all_processes(
    one: dict[str, Any], two: dict[str, list[Any]], action: str, found: dict[str, Any], strategy: str
) -> None:
    alone, together = one[action], two[f"{action}-{strategy}"]
    for metrics in (alone["metrics"], *(process["metrics"] for process in together)):
        assert {name: metrics["alerts"][name] for name in found} == found
    assert_same_curve(alone["lines"], together[0]["lines"])
    assert together[0]["digest"] == together[1]["digest"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_process_holds_its_share_of_weights_gradients_and_optimizer(two: dict[str, list[Any]], kind: str) -> None:
    for found in two[f"shares-{kind}"]:
        assert found.pop("shell") == 0
        assert found == {name: pytest.approx(1 / 2, rel=0.02) for name in ("weights", "gradients", "optimizer")}


def test_a_process_holds_gathered_weights_only_while_a_layer_computes(two: dict[str, list[Any]]) -> None:
    """In bf16, of 8 layers: after a forward pass, the activations of a few tokens and the head; in a backward pass, half of
    the gradients, and of one layer weights and gradients in bf16, and in fp32 what is sent and received: 2 + (2 + 2 + 4 + 2) /
    8.
    """
    for found in two["held"]:
        assert found["forward"] < 0.25
        assert found["step"] < 3.6


def test_processes_share_the_pages_of_a_frozen_base(two: dict[str, list[Any]]) -> None:
    assert two["pages"] == [{"matrices": 15, "shared": 15, "own": 0}] * 2


@pytest.mark.parametrize("kind", ["bf16", "adapter"])
def test_weights_gathered_in_bf16_learn_what_autocast_does(two: dict[str, list[Any]], kind: str) -> None:
    copies, gathered = two[f"{kind}-ddp"][0], two[f"{kind}-fsdp"][0]
    assert gathered["metrics"]["choices"]["precision"] == "bf16"
    assert_same_curve(copies["lines"], gathered["lines"], within=ENOUGH_BF16)


def test_a_killed_group_resumes_and_ends_bit_for_bit_the_same(folder: Path, two: dict[str, list[Any]]) -> None:
    assert "killed" not in two
    shutil.copytree(folder / "killed", folder / "resumed")
    resumed = launch(folder, 2, {"resumed": MUON}, accelerate=True)["resumed"][0]
    assert any(line.get("note", "").startswith("continues from step") for line in resumed["lines"])
    assert resumed["digest"] == two["muon"][0]["digest"]
    for name in ("loss", "validation_loss", "targets"):
        assert resumed["metrics"][name] == two["muon"][0]["metrics"][name]


def test_a_training_goes_on_with_another_number_of_processes_and_strategy(
    folder: Path, one: dict[str, Any], four: dict[str, list[Any]]
) -> None:
    shutil.copytree(folder / "killed", folder / "alone")
    alone = run_case(folder, MUON | {"scratch": "alone"})
    for found, now in ((four["four"][0], "4 processes (ddp)"), (alone, "1 process")):
        notes = [line["note"] for line in found["lines"] if "note" in line]
        assert f"began with 2 processes (fsdp) on cpu, goes on with {now} on cpu: " in notes[0]
        assert notes[1].startswith("continues from step")
        assert found["metrics"]["validation_loss"] == pytest.approx(one["muon"]["metrics"]["validation_loss"], abs=ENOUGH)


def test_a_group_never_uses_another_strategy() -> None:
    learner = Learner(tiny_model(), next_token_loss, precision="fp32")
    with pytest.raises(RuntimeError, match="strategy of 1 processes: expected 'fsdp', got 'single'"):
        ProcessGroup().wrap(learner, "fsdp")


def test_a_base_in_four_bits_is_not_sharded() -> None:
    model = tiny_model()
    lora.quantize(model, double=True)
    with pytest.raises(InputError, match=r'parallel\.strategy: expected "ddp" .* got "fsdp", and .* of uint8'):
        shard(Learner(model, next_token_loss, precision="fp32"), "fsdp", device=torch.device("cpu"), processes=2)


def test_one_process_is_single_whatever_the_strategy(tmp_path: Path) -> None:
    found = [tiny_training(tiny_model(), tmp_path / name, strategy=name, validation=None) for name in ("ddp", "fsdp")]
    assert [metrics["choices"]["strategy"] for metrics in found] == ["single", "single"]
    assert found[0]["loss"] == found[1]["loss"]


@pytest.mark.long
@pytest.mark.parametrize("changes", [{"dropout": 0.0}, {"dropout": 0.1}, {"model": {"tied": False}, "adapter": True}])
def test_two_hundred_steps_are_the_same_in_every_layout(tmp_path: Path, changes: dict[str, Any]) -> None:
    alone = run_case(tmp_path, {"steps": 200, "scratch": "one"} | changes)
    for processes in (2, 4):
        cases = {f"{strategy}-{processes}": {"steps": 200, "strategy": strategy} | changes for strategy in ("ddp", "fsdp")}
        for found in launch(tmp_path, processes, cases).values():
            assert_same_curve(alone["lines"], found[0]["lines"])


def test_a_trunk_of_sharded_processes_is_continued_by_ddp_and_by_one_process(
    folder: Path, one: dict[str, Any], two: dict[str, list[Any]]
) -> None:
    """Two processes under "fsdp" leave a trunk; two under "ddp" continue it, and so does one process."""
    alone = run_case(folder, REST | {"scratch": "rest-alone"})
    for found in (two["rest"][0], alone):
        assert found["metrics"]["first_step"] == 5 and found["metrics"]["steps"] == STEPS
        assert found["metrics"]["loss"] == pytest.approx(one["stable"]["metrics"]["loss"], abs=ENOUGH)
        assert found["metrics"]["validation_loss"] == pytest.approx(one["stable"]["metrics"]["validation_loss"], abs=ENOUGH)
    assert any("2 processes (fsdp) on cpu, goes on with 1 process" in line.get("note", "") for line in alone["lines"])

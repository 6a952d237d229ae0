"""`run prove-resume`: equal trainings are equal, and every difference is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_cache import flip
from small_recipe import RECIPE, Folder

from llm.data.batch import Batch
from llm.training.row_log import RowLog
from runner.artifacts import SCRATCH
from runner.cli import main
from runner.diagnostics.resume_diff import TrainingOutput, compare
from runner.stages.pretrain import Pretrain

PRETRAIN = """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 32, layers = 2, heads = 2, dropout = 0.1 }
batch_tokens = 256
micro_batch = 3
"""
FINE_TUNING = """
[stage.chat]
kind = "sft"
model = "base"
data = [{ files = "chats.jsonl" }]
batch_tokens = 256
dropout = 0.1
[stage.lora]
kind = "lora"
base = "base"
data = [{ files = "chats.jsonl" }]
batch_tokens = 256
dropout = 0.1
[stage.qlora]
kind = "lora"
base = "base"
data = [{ files = "chats.jsonl" }]
batch_tokens = 256
quantize = "nf4"
"""


def recipe_in(folder: Folder, more: str = "") -> Folder:
    chats = [{"prompt": f"the heart {number}", "response": f"of the liver {number}"} for number in range(40)]
    (folder.root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    folder.write(RECIPE + PRETRAIN + "budget = { steps = 4 }\n" + more)
    return folder


def proof(folder: Folder, stage: str, *options: str) -> dict[str, Any]:
    done = folder.call("prove-resume", str(folder.recipe), stage, "--json", *options)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["equal"] else 3)
    return found


def test_a_training_that_is_killed_ends_like_an_uninterrupted_one(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_in(folder)
    found = proof(folder, "base", "--processes", "1", "--steps", "13")
    assert found["equal"], found
    assert found["steps"] == 16, "rounded up to a checkpoint at the end"
    assert 4 <= found["continued_after_step"] <= found["killed_after_step"] < 16
    assert found["choices"]["processes"] == 1
    checks = {check["name"]: check["what"] for check in found["checks"]}
    assert list(checks) == ["rows", "weights", "optimizer", "counters", "artifact"]
    assert checks["rows"].startswith("128 rows in 16 steps")
    assert [path.suffix for path in sorted((folder.cache / "proofs").iterdir())] == [".json", ".log"]
    assert main(["why", str(folder.recipe), "base", "--cache", str(folder.cache)]) == 0
    assert "ended bit for bit like an uninterrupted training (1 process, eager" in capsys.readouterr().out
    assert folder.states()["base"] == "run", "a proof is no result"


@pytest.mark.long
def test_a_trunk_and_its_decay_that_are_killed_end_like_uninterrupted_ones(folder: Folder) -> None:
    recipe_in(folder)
    folder.write(RECIPE + PRETRAIN + 'budget = { steps = 41 }\nschedule = { kind = "wsd", decay_steps = 20 }\n')
    found = proof(folder, "base-trunk", "--steps", "16")
    assert found["equal"] and found["steps"] == 16, found
    done = folder.run("--until", "base-trunk")
    assert done.returncode == 0, done.stderr
    found = proof(folder, "base", "--steps", "16")
    assert found["equal"] and found["steps"] == 40 and found["continued_after_step"] >= 21, found


def test_a_stage_that_does_not_train_or_lacks_its_inputs_is_refused(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_in(folder, FINE_TUNING)
    place = ("--cache", str(folder.cache))
    assert main(["prove-resume", str(folder.recipe), "tokens", *place]) == 2
    assert "expected a stage that trains, but its kind is 'pack'" in capsys.readouterr().err
    assert main(["prove-resume", str(folder.recipe), "chat", *place]) == 3
    assert "expected base finished" in capsys.readouterr().err
    assert not (folder.cache / "proofs").exists()


@pytest.fixture
def output(tmp_path: Path) -> Callable[[str], TrainingOutput]:
    """Makes the output of a training of two steps of two rows."""

    def make(name: str) -> TrainingOutput:
        found = TrainingOutput(tmp_path / name, tmp_path / f"{name}-rows")
        checkpoint = found.scratch / "checkpoints" / "step-00000002"
        checkpoint.mkdir(parents=True)
        for file in ("weights", "optimizer"):
            save_file({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, checkpoint / f"{file}.safetensors")
        progress = {"step": 2, "best": {"validation_loss": 3.0}, "seconds": 1.0 if name == "whole" else 2.0}
        (checkpoint / "state.json").write_text(json.dumps({"facts": {"progress": progress}}))
        (found.work / "model.safetensors").write_bytes(b"weights")
        log = RowLog(found.row_logs / "0.jsonl")
        for step in range(2):
            log(step, [batch_of(4 * step), batch_of(4 * step + 1)])
        return found

    return make


def batch_of(first: int) -> Batch:
    tokens = torch.arange(first, first + 6)[None]
    return Batch(tokens, tokens + 1, torch.zeros(1, 6, dtype=torch.int32), tokens * 0, torch.tensor([first % 4]))


def different(whole: TrainingOutput, resumed: TrainingOutput) -> dict[str, list[str]]:
    stage = Pretrain.model_construct()
    return {check.name: check.different for check in compare(whole, resumed, stage, steps=range(2)) if check.different}


def test_equal_outputs_differ_only_in_their_times(output: Callable[[str], TrainingOutput]) -> None:
    assert different(output("whole"), output("resumed")) == {}


def test_every_difference_is_found_and_named(output: Callable[[str], TrainingOutput]) -> None:
    whole = output("whole")
    for name in ("weights", "optimizer"):
        resumed = output(f"other-{name}")
        path = resumed.scratch / "checkpoints" / "step-00000002" / f"{name}.safetensors"
        flip(path, path.stat().st_size * 8 - 1)  # of the last tensor
        assert different(whole, resumed) == {name: ["b"]}
        tensors = load_file(path)
        del tensors["a"]
        save_file(tensors, path)
        assert different(whole, resumed) == {name: ["a", "b"]}
    resumed = output("other-best")
    state = resumed.scratch / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(state.read_text().replace("3.0", "2.9"))
    assert different(whole, resumed) == {"counters": ["best"]}
    resumed = output("other-artifact")
    (resumed.work / "config.json").touch()
    assert different(whole, resumed) == {"artifact": ["config.json"]}


def test_rows_that_differ_or_are_missing_are_found_and_repeated_ones_are_not(output: Callable[[str], TrainingOutput]) -> None:
    whole, resumed = output("whole"), output("resumed")
    log = resumed.row_logs / "0.jsonl"
    written = log.read_text()
    RowLog(log)(1, [batch_of(4), batch_of(5)])
    assert different(whole, resumed) == {}, "a step that was done again, from the same rows"
    RowLog(log)(1, [batch_of(4), batch_of(9)])
    assert different(whole, resumed) == {"rows": ["step 1, row 1"]}
    log.write_text(written.rpartition("\n{")[0])
    assert different(whole, resumed) == {"rows": ["step 1, row 0", "step 1, row 1"]}
    log.write_text(written[:-20])  # as a kill leaves it
    assert different(whole, resumed) == {"rows": ["step 1, row 0", "step 1, row 1"]}
    shutil.rmtree(resumed.work / SCRATCH / "checkpoints")
    assert set(different(whole, resumed)) == {"rows", "weights", "optimizer", "counters"}


@pytest.mark.long
@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("stage", ["base", "chat", "lora", "qlora"])
def test_every_training_that_is_killed_ends_bit_for_bit_like_an_uninterrupted_one(
    trained: Folder, stage: str, processes: str, compiled: str
) -> None:
    found = proof(trained, stage, "--processes", processes, "--set", f"parallel.compile={compiled}")
    assert found["equal"], found
    assert found["choices"]["processes"] == int(processes) and found["choices"]["compiled"] is (compiled == "true")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder whose base has been trained."""
    folder = recipe_in(Folder(tmp_path_factory.mktemp("trained")), FINE_TUNING)
    done = folder.run("--until", "base")
    assert done.returncode == 0, done.stderr
    return folder

"""Training on several machines: two runs on loopback that train together."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_recipe import RECIPE, Folder
from watched_processes import wait_for

from runner.errors import MachineLostError
from runner.execution.node_layout import Layout
from runner.execution.stop import StopRequest
from runner.multi_node.connection import Connection
from runner.multi_node.coordinator import Coordinator, opened

RUNNING: list[subprocess.Popen[str]] = []
TRAINING = """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 16, layers = 1, heads = 1 }
batch_tokens = 128
budget = { steps = 6 }
schedule = { kind = "constant", learning_rate = 1e-2 }
checkpoint_every = 2
[stage.again]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 16, layers = 1, heads = 1 }
batch_tokens = 128
budget = { steps = 4 }
schedule = { kind = "constant", learning_rate = 1e-2 }
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder with all stages before the training finished. Tests use a copy."""
    folder = Folder(tmp_path_factory.mktemp("packed"))
    folder.write(RECIPE + TRAINING)
    done = folder.run("--until", "tokens")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(packed: Folder, tmp_path: Path) -> Folder:
    shutil.copytree(packed.root, tmp_path / "here")
    return Folder(tmp_path / "here")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def end_runs() -> Iterator[None]:
    """Ends the runs that a failed test left."""
    yield
    while RUNNING:
        process = RUNNING.pop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the run that a launcher has started
        process.communicate()


def begun(folder: Folder, rank: int, port: int, *words: str) -> subprocess.Popen[str]:
    """A run of the recipe as on its own machine."""
    command = [*folder.command("run", str(folder.recipe)), "--machines", "2", "--machine-rank", str(rank)]
    return launched([*command, "--main-address", f"127.0.0.1:{port}", "--cache", str(folder.cache), *words], rank)


def launched(command: list[str], rank: int, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "STOCKPOT_MACHINE": f"host{rank}", **variables}
    RUNNING.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True))
    return RUNNING[-1]


def ended(*runs: subprocess.Popen[str]) -> list[tuple[int, str]]:
    output = [run.communicate()[1] for run in runs]
    RUNNING.clear()
    return [(run.returncode, text) for run, text in zip(runs, output, strict=True)]


def losses(folder: Folder, stage: str) -> list[float]:
    lines = (folder.artifact(stage) / "metrics.jsonl").read_text().splitlines()
    return [line["validation_loss"] for line in map(json.loads, lines) if "validation_loss" in line]


def test_two_machines_that_share_a_cache_reach_the_losses_of_one(folder: Folder) -> None:
    port = free_port()
    (first, output), (second, other_output) = ended(*(begun(folder, rank, port) for rank in (0, 1)))
    assert (first, second) == (0, 0), f"{output}\n{other_output}"
    assert "machine 0 has finished" in other_output
    record = json.loads((folder.artifact("base") / "record.json").read_text())
    assert (record["processes"], record["machines"]) == (2, 2)
    again = ended(begun(folder, 1, port))
    assert again[0][0] == 0 and "everything is cached" in again[0][1]
    alone = Folder(shutil.copytree(folder.root, folder.root.parent / "alone"))
    assert alone.run("--until", "base", "--force", "base").returncode == 0
    assert losses(alone, "base") == pytest.approx(losses(folder, "base"), rel=1e-4)


def as_torchrun_starts_it(folder: Folder, rank: int, port: int, *words: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port - 1), "--no-python"]
    command = [*torchrun, *folder.command("run", str(folder.recipe)), "--cache", str(folder.cache), *words]
    return launched(command, rank)


def as_slurm_starts_it(folder: Folder, rank: int, port: int, *words: str) -> subprocess.Popen[str]:
    command = [*folder.command("run", str(folder.recipe)), "--cache", str(folder.cache), *words]
    variables = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0", "SLURM_PROCID": str(rank)}
    return launched([*command, "--main-address", f"localhost:{port}"], rank, **variables)  # the usual port may be taken here


@pytest.mark.long
@pytest.mark.parametrize("start", [as_torchrun_starts_it, as_slurm_starts_it])
def test_torchrun_and_slurm_start_runs_that_find_each_other(folder: Folder, start: Any) -> None:
    port = free_port()
    results = ended(*(start(folder, rank, port, "--until", "again") for rank in (0, 1)))
    assert [code for code, _ in results] == [0, 0], results
    record = json.loads((folder.artifact("again") / "record.json").read_text())
    assert (record["processes"], record["machines"]) == (2, 2)


@pytest.mark.parametrize(("killed", "retries"), [(1, 1), pytest.param(0, 0, marks=pytest.mark.long)])
def test_when_a_worker_dies_all_machines_retry_or_machine_0_continues_alone(folder: Folder, killed: int, retries: int) -> None:
    recipe = ("--until", "base", "--set", "stage.base.budget={steps=120}", "--set", f"parallel.retries={retries}")
    port = free_port()
    runs = [begun(folder, rank, port, *recipe) for rank in (0, 1)]
    wait_for(lambda: list(folder.cache.glob("work/*/.work/checkpoints/step-*2/state.json")), seconds=300)
    (worker,) = folder.cache.glob(f"work/*/.work/workers/host{killed}-{killed}")
    os.kill(int(worker.read_text()), signal.SIGKILL)
    (first, output), (second, other_output) = ended(*runs)
    assert (first, second) == (0, 0), f"{output}\n{other_output}"
    assert "machine 0 has finished" in other_output and "Traceback" not in output + other_output
    record = json.loads(next(folder.cache.glob("stages/pretrain-*/record.json")).read_text())
    (fault,) = record["faults"]
    assert fault["processes"] == 2 and "signal 9" in fault["cause"]
    if retries:
        assert (record["processes"], record["machines"]) == (2, 2)
        assert "retries from the last checkpoint (0 more retries left)" in output
    else:
        assert record["processes"] == 1 and "machines" not in record
        assert "continues with one process and the same batch from the last checkpoint" in output


def test_machines_with_separate_caches_exchange_artifacts_through_a_remote(folder: Folder) -> None:
    ignored, port = shutil.ignore_patterns("cache"), free_port()
    other = Folder(shutil.copytree(folder.root, folder.root.parent / "there", ignore=ignored))
    remote = ("--until", "base", "--remote", str(folder.root.parent / "remote"))
    results = ended(begun(folder, 0, port, *remote), begun(other, 1, port, *remote))
    assert [code for code, _ in results] == [0, 0], results
    done = other.run("--until", "base", "--remote", remote[-1], "--cache", str(other.cache))
    assert "fetched from the remote" in done.stderr
    assert other.digest("base") == folder.digest("base")


def test_machines_that_share_neither_cache_nor_remote_are_refused(folder: Folder) -> None:
    other, port = Folder(shutil.copytree(folder.root, folder.root.parent / "there")), free_port()
    for code, text in ended(begun(folder, 0, port), begun(other, 1, port)):
        assert code == 2, text
        assert "machine 1" in text and "sees neither the cache of this machine" in text and "Traceback" not in text


def test_machines_with_different_recipes_are_refused_with_the_difference(folder: Folder) -> None:
    port = free_port()
    for code, text in ended(begun(folder, 0, port), begun(folder, 1, port, "--set", "stage.base.budget={steps=7}")):
        assert code == 2, text
        assert "stage 'base' differs from that of machine 0: budget.steps: 6 -> 7" in text and "Traceback" not in text


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.long), 1])
def test_when_one_machine_dies_for_good_the_other_ends_with_a_message_and_the_stage_can_resume(
    folder: Folder, killed: int
) -> None:
    impatient = ("--set", "parallel.rejoin_minutes=0.01", "--set", "parallel.retries=0", "--set", "parallel.fallback='none'")
    port, long = free_port(), ("--until", "base", "--set", "stage.base.budget={steps=4000}", *impatient)
    runs = [begun(folder, rank, port, *long) for rank in (0, 1)]
    wait_for(lambda: list(folder.cache.glob("work/*/.work/checkpoints/step-*2/state.json")), seconds=300)
    runs[killed].send_signal(signal.SIGKILL)
    left = ended(*runs)[1 - killed]
    assert left[0] == 3, left[1]
    assert f"machine {killed}" in left[1] and "is gone" in left[1] and "Traceback" not in left[1]
    plan = json.loads(folder.call("plan", str(folder.recipe), "--json", *long).stdout)
    assert plan["stages"][-1]["state"] == "resume"


def test_a_machine_lost_during_a_failed_training_is_reported_as_its_cause(tmp_path: Path) -> None:
    port = free_port()
    coordinator = Coordinator(
        Layout(2, 0, "127.0.0.1", port), tmp_path, remote=None, secret=b"s", note=print, stop=StopRequest(), rejoin_seconds=0.2
    )
    with opened(coordinator):
        other = Connection(socket.create_connection(("127.0.0.1", port)), b"s", is_main=False)
        other.send(do="hello", rank=1, machines=2, who="process 7 on there", shares=True)
        coordinator.assemble()
        other.close()
        assert coordinator.causes() == ["machine 1 (process 7 on there) is gone; checkpoints are kept"]
        with pytest.raises(MachineLostError, match="machine 1 of 2 did not come back within 0 s"):
            coordinator.assemble()
        coordinator.give_up()
        assert coordinator.is_broken


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_that_dies_and_is_restarted_takes_part_again(folder: Folder, killed: int) -> None:
    port, long = free_port(), ("--until", "base", "--set", "stage.base.budget={steps=120}")
    runs = [begun(folder, rank, port, *long) for rank in (0, 1)]
    wait_for(lambda: list(folder.cache.glob("work/*/.work/checkpoints/step-*2/state.json")), seconds=300)
    os.killpg(runs[killed].pid, signal.SIGKILL)
    runs[killed].communicate()
    (survivor, output), (back, other_output) = ended(runs[1 - killed], begun(folder, killed, port, *long))
    assert (survivor, back) == (0, 0), f"{output}\n{other_output}"
    assert f"machine {killed}" in output and "is gone" in output and "Traceback" not in output + other_output
    record = json.loads(next(folder.cache.glob("stages/pretrain-*/record.json")).read_text())
    assert (record["processes"], record["machines"]) == (2, 2)


@pytest.mark.long
def test_when_a_machine_does_not_come_back_machine_0_trains_alone(folder: Folder) -> None:
    impatient = ("--set", "parallel.rejoin_minutes=0.01", "--set", "parallel.retries=1")
    port, long = free_port(), ("--set", "stage.base.budget={steps=120}", *impatient)
    runs = [begun(folder, rank, port, *long) for rank in (0, 1)]
    wait_for(lambda: list(folder.cache.glob("work/*/.work/checkpoints/step-*2/state.json")), seconds=300)
    os.killpg(runs[1].pid, signal.SIGKILL)
    (code, output), _ = ended(*runs)
    assert code == 0, output
    assert "is gone" in output and "machine 1 of 2 did not come back within 1 s" in output and "Traceback" not in output
    assert "continues with one process and the same batch from the last checkpoint" in output
    records = [json.loads(path.read_text()) for path in folder.cache.glob("stages/pretrain-*/record.json")]
    assert [record["processes"] for record in records] == [1, 1], "the second training does not wait for machine 1"
    assert sorted(len(record.get("faults", ())) for record in records) == [0, 2]


def test_stopping_one_machine_stops_all_of_them_after_a_checkpoint(folder: Folder) -> None:
    port, long = free_port(), ("--until", "base", "--set", "stage.base.budget={steps=4000}")
    runs = [begun(folder, rank, port, *long) for rank in (0, 1)]
    wait_for(lambda: list(folder.cache.glob("work/*/.work/checkpoints/step-*2/state.json")), seconds=300)
    runs[1].send_signal(signal.SIGTERM)
    for code, text in ended(*runs):
        assert code == 130, text
        assert "interrupted" in text

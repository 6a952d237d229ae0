"""Runs on a real Slurm cluster of three nodes on this machine: equal results, and what happens when something ends."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_cluster import SlurmCluster, missing, slurm_cluster
from small_recipe import RECIPE, Folder
from watched_processes import wait_for

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"needs Slurm: {missing()}")

TRAINING = """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 16, layers = 1, heads = 1 }
batch_tokens = 128
budget = { steps = 6 }
schedule = { kind = "constant", learning_rate = 1e-2 }
checkpoint_every = 2
"""
LONG = ("--set", "stage.base.budget={steps=200}", "--set", "stage.base.checkpoint_every=20")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running


@pytest.fixture(scope="module")
def packed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder whose stages before the training ran on the cluster. Tests use a copy."""
    folder = Folder(tmp_path_factory.mktemp("packed"))
    folder.write(RECIPE + TRAINING)
    done = run(cluster, folder, "--until", "tokens")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(packed: Folder, tmp_path: Path) -> Folder:
    return Folder(shutil.copytree(packed.root, tmp_path / "here"))


def words(cluster: SlurmCluster, folder: Folder, *options: str) -> list[str]:
    return [
        *cluster.inside,
        *folder.command("run", str(folder.recipe), "--engine", "slurm", "--cache", str(folder.cache)),
        *options,
    ]


def environment(cluster: SlurmCluster) -> dict[str, str]:
    return {**cluster.environment, "STOCKPOT_CORES": "1"}


def run(cluster: SlurmCluster, folder: Folder, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(cluster, folder, *options), env=environment(cluster), capture_output=True, text=True)


@contextlib.contextmanager
def begun(cluster: SlurmCluster, folder: Folder, *options: str) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        words(cluster, folder, *options), env=environment(cluster), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


def record_of(folder: Folder, kind: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(next(folder.cache.glob(f"stages/{kind}-*/record.json")).read_text())
    return record


def digest_of(folder: Folder) -> str:
    return str(record_of(folder, "pretrain")["digest"])


def checkpoints(folder: Folder) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in folder.cache.glob("work/*/.work/checkpoints/step-*[0-9]/state.json"))


def processes_of(folder: Folder) -> list[psutil.Process]:
    """Nodes, launchers and workers on any node."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"{folder.cache}/work/" in " ".join(process.cmdline()):
                found.append(process)
    return found


def environment_of(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def workers_of(folder: Folder) -> list[psutil.Process]:
    return [one for one in processes_of(folder) if "RANK" in environment_of(one)]


def test_stages_on_a_cluster_make_the_bytes_that_this_machine_makes(packed: Folder, finished: Folder) -> None:
    for stage in ("corpus", "tokenizer", "tokens"):
        assert packed.digest(stage) == finished.digest(stage)
    assert record_of(packed, "corpus")["engine"]["kind"] == "slurm"


def test_a_training_on_two_nodes_ends_like_one_in_two_processes_here(cluster: SlurmCluster, folder: Folder) -> None:
    done = run(cluster, folder, "--nodes", "2")
    assert done.returncode == 0, done.stderr
    record = record_of(folder, "pretrain")
    assert record["processes"] == 2 and len(set(record["engine"]["nodes"])) == 2 and "faults" not in record
    spread = folder.digest("base")
    here = folder.run("--processes", "2", "--force", "base")
    assert here.returncode == 0, here.stderr
    assert folder.digest("base") == spread and "engine" not in record_of(folder, "pretrain")


def test_what_cannot_start_says_why_and_leaves_the_queue_when_it_is_stopped(cluster: SlurmCluster, folder: Folder) -> None:
    shown = subprocess.run(
        [*cluster.inside, *folder.command("engine", "--engine", "slurm")],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and [line.split()[:3] for line in shown.stdout.splitlines()[2:5]] == [
        [name, "idle", "2"] for name in ("n1", "n2", "n3")
    ], shown
    with begun(cluster, folder, "--nodes", "4") as process:
        assert process.stderr
        line = next(line for line in process.stderr if "waits for" in line)
        assert "base: waits for job " in line and "of Slurm, PENDING: " in line, line
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    wait_for(lambda: not cluster.ask("squeue", "-h"), seconds=30)


def test_inside_an_allocation_stages_are_its_steps(cluster: SlurmCluster, folder: Folder) -> None:
    before = folder.digest("corpus")
    command = words(cluster, folder, "--until", "corpus", "--force", "corpus")[len(cluster.inside) :]
    done = subprocess.run(
        [*cluster.inside, "salloc", "--nodes=2", *command], env=environment(cluster), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert folder.digest("corpus") == before
    jobs = cluster.ask("squeue", "-h", "--states=all", "-o", "%j").split()
    assert len([job for job in jobs if job.startswith("stockpot-")]) < len(jobs), jobs
    assert record_of(folder, "corpus")["engine"]["nodes"][0] in ("n1", "n2", "n3")


@pytest.mark.long
def test_a_node_that_loses_power_costs_a_minute_and_one_checkpoint_at_most(cluster: SlurmCluster, folder: Folder) -> None:
    undisturbed = Folder(shutil.copytree(folder.root, folder.root.parent / "undisturbed"))
    assert run(cluster, undisturbed, "--nodes", "2", *LONG).returncode == 0
    with begun(cluster, folder, "--nodes", "2", *LONG) as process:
        wait_for(lambda: checkpoints(folder), seconds=300)
        before = {environment_of(one)["RANK"]: one for one in workers_of(folder)}
        lost = environment_of(before["1"])["SLURMD_NODENAME"]
        cluster.cut_power(lost)
        cut = time.monotonic()
        wait_for(lambda: [one for one in workers_of(folder) if one not in before.values()], 60)
        again = time.monotonic() - cut
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    cluster.start_node(lost)
    faults = record_of(folder, "pretrain")["faults"]
    assert len(faults) == 1 and "retries from the last checkpoint" in errors, errors
    print(f"after a node lost power: workers on other nodes after {again:.0f} s")
    (fault,) = faults
    kept = int(re.findall(r"continues from step (\d+)", errors)[-1])
    assert fault["step"] - kept <= 20, (fault, kept)
    assert digest_of(folder) == digest_of(undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_on_any_node_after_the_run_is_killed_or_stopped(
    cluster: SlurmCluster, folder: Folder, number: signal.Signals
) -> None:
    with begun(cluster, folder, "--nodes", "2", *LONG) as process:
        wait_for(lambda: checkpoints(folder), seconds=300)
        assert len(workers_of(folder)) >= 2
        os.kill(process.pid, number)
        ended = time.monotonic()
        code = process.wait(60)
        wait_for(lambda: not processes_of(folder), seconds=60)
        seconds = time.monotonic() - ended
    assert code == (130 if number == signal.SIGINT else -number)
    print(f"after {number.name}: nothing is left after {seconds:.1f} s")
    wait_for(lambda: not cluster.ask("squeue", "-h", "-t", "PENDING,RUNNING"), seconds=30)


@pytest.mark.long
def test_a_run_that_is_a_job_is_requeued_after_its_node_lost_power(cluster: SlurmCluster, folder: Folder) -> None:
    undisturbed = Folder(shutil.copytree(folder.root, folder.root.parent / "undisturbed"))
    assert run(cluster, undisturbed, *LONG).returncode == 0
    script = folder.root / "run.sh"
    command = words(cluster, folder, *LONG)[len(cluster.inside) :]
    script.write_text(f"#!/bin/bash\nexec {shlex.join(command)}\n")
    submitted = [
        *cluster.inside,
        "sbatch",
        "--requeue",
        "--nodes=1",
        f"--output={folder.root}/out",
        "--open-mode=append",
        str(script),
    ]
    subprocess.run(submitted, env=environment(cluster), check=True, capture_output=True)
    wait_for(lambda: checkpoints(folder), seconds=300)
    lost = environment_of(processes_of(folder)[0])["SLURMD_NODENAME"]
    cluster.cut_power(lost)
    wait_for(lambda: "down" in cluster.ask("sinfo", "-h", "-n", lost, "-o", "%T"), seconds=60)
    cluster.start_node(lost)
    wait_for(lambda: list(folder.cache.glob("stages/pretrain-*/record.json")), seconds=600)
    assert digest_of(folder) == digest_of(undisturbed), (folder.root / "out").read_text()

"""Machine faults during a training: killed or suspended workers, failing groups, full disks, and how the run recovers."""

import json
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_recipe import Folder
from watched_processes import wait_for

from runner.engine import launch, liveness
from runner.execution.retry_policy import RetryPolicy
from runner.execution.watchdog import COUNTED_SECONDS, FIRST_SECONDS, HEARTBEAT, Watchdog
from runner.stage import Parallel


def started(folder: Folder, *options: str) -> tuple[subprocess.Popen[str], Path]:
    """A run, and the scratch folder of its training."""
    plan = json.loads(folder.call("plan", str(folder.recipe), "--json", *options).stdout)
    (key,) = (stage["key"] for stage in plan["stages"] if stage["name"] == "base")
    environment = {**os.environ, "STOCKPOT_CACHE": str(folder.cache)}
    command = folder.command("run", str(folder.recipe), *options)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    return process, folder.cache / "work" / f"pretrain-{key}" / ".work"


def record_of(folder: Folder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder.artifact("base") / "record.json").read_text())
    return found


def test_a_killed_and_a_suspended_worker_change_only_the_record(trained: Folder, fresh: Folder) -> None:
    process, scratch = started(fresh, "--set", "parallel.stall_minutes=0.1", "--set", "parallel.retries=9")
    wait_for(lambda: (scratch / "checkpoints" / "step-00000020").exists() and liveness.live_workers(scratch))
    (killed,) = liveness.live_workers(scratch)
    os.kill(killed, signal.SIGKILL)
    wait_for(
        lambda: (
            liveness.live_workers(scratch) not in ([], [killed]) and list((scratch / "checkpoints").glob("step-00000[1-9]*"))
        )
    )
    (stopped,) = liveness.live_workers(scratch)
    os.kill(stopped, signal.SIGSTOP)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "base: its worker was killed by signal 9 (perhaps out of memory); it retries from the last" in errors
    assert "base: a step has not ended for" in errors and "continues from step" in errors
    assert fresh.digest("base") == trained.digest("base")
    faults = record_of(fresh)["faults"]
    assert len(faults) >= 2 and {fault["processes"] for fault in faults} == {1}
    assert any("signal 9" in fault["cause"] for fault in faults) and any("has not ended" in fault["cause"] for fault in faults)
    log = next((fresh.cache / "logs").glob("pretrain-*.log")).read_text()
    assert "most recent call first" in log and "runner/execution/worker.py" in log  # the stacks of the suspended one
    assert "faults" not in record_of(trained)


@pytest.mark.skipif(not launch.can_fork(), reason="workers are forked only on Linux, and where there is no GPU")
def test_the_run_continues_without_a_killed_fork_server_and_its_worker(trained: Folder, fresh: Folder) -> None:
    process, scratch = started(fresh)
    wait_for(lambda: (scratch / "checkpoints" / "step-00000020").exists() and liveness.live_workers(scratch))
    worker = psutil.Process(*liveness.live_workers(scratch))
    server = psutil.Process(worker.ppid())
    assert server.ppid() == process.pid and "runner.execution.fork_server" in server.cmdline()
    plan = json.loads(fresh.call("plan", str(fresh.recipe), "--json").stdout)
    assert [stage["reason"] for stage in plan["stages"] if stage["name"] == "base"] == [
        "a process of this machine works on it now"
    ]
    server.kill()
    wait_for(lambda: liveness.live_workers(scratch) not in ([], [worker.pid]))
    (second,) = liveness.live_workers(scratch)
    assert second != worker.pid and psutil.Process(second).ppid() == process.pid
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "base: its worker was killed by signal 9" in errors and "continues from step" in errors
    assert fresh.digest("base") == trained.digest("base")


def test_a_group_that_keeps_losing_a_worker_continues_as_one_process(trained: Folder, fresh: Folder) -> None:
    process, scratch = started(fresh, "--set", "parallel.processes=2", "--set", "parallel.retries=0")
    wait_for(lambda: len(liveness.live_workers(scratch)) == 2 and (scratch / HEARTBEAT).exists())
    os.kill(liveness.live_workers(scratch)[1], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "continues with one process and the same batch" in errors
    record, undisturbed = record_of(fresh), record_of(trained)
    assert record["processes"] == 1 and [fault["processes"] for fault in record["faults"]] == [2]
    assert all("signal 9" in fault["cause"] for fault in record["faults"])
    assert record["metrics"]["validation_loss"] == pytest.approx(undisturbed["metrics"]["validation_loss"], abs=1e-3)


def test_an_error_of_the_recipe_is_not_retried(fresh: Folder) -> None:
    done = fresh.run("--set", "stage.base.batch_tokens=8")
    assert done.returncode == 3
    assert "stage 'base': batch_tokens: expected at least one row of 32 tokens" in done.stderr
    assert "retries" not in done.stderr


def test_a_full_disk_during_a_training_is_reported_and_not_retried(trained: Folder, fresh: Folder) -> None:
    def nearly_full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))  # the weights fit, the optimizer's state does not

    command = fresh.command("run", str(fresh.recipe), "--cache", str(fresh.cache))
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=nearly_full)
    assert done.returncode == 3
    assert "stage 'base': File too large while writing under" in done.stderr
    assert "free some space and run again, finished work is kept" in done.stderr
    assert "retries from the last checkpoint" not in done.stderr and "Traceback" not in done.stderr
    assert not list(fresh.cache.glob("work/*/.work/checkpoints/*"))
    done = fresh.run()
    assert done.returncode == 0, done.stderr
    assert fresh.digest("base") == trained.digest("base")


def test_retries_are_counted_from_the_highest_step_and_the_fallback_is_one_process(tmp_path: Path) -> None:
    policy = RetryPolicy(tmp_path, Parallel(retries=1), processes=4)
    outcomes = [policy.after_fault("a fault", step=step) for step in (10, 10, 10, 5)]
    assert [(text or "").partition(" ")[0] for text in outcomes] == ["retries", "continues", "retries", ""]
    assert [fault["processes"] for fault in policy.faults] == [4, 4, 1, 1] and policy.faults[-1]["then"] == "gave up"
    assert RetryPolicy(tmp_path, Parallel(), processes=4).faults == policy.faults  # a resumed run knows them
    policy = RetryPolicy(tmp_path / "none", Parallel(retries=1, fallback="none"), processes=4)
    assert [policy.after_fault("a fault", step=step) is None for step in (10, 20, 20, 20)] == [False, False, True, True]


def test_the_watchdog_waits_many_times_the_longest_step_and_longer_for_the_first(tmp_path: Path) -> None:
    clock = [0.0]
    watchdog = Watchdog(tmp_path, minutes=0.5, now=lambda: clock[0])
    beats = iter(range(1, 100))

    def after(seconds: float, *, beat: bool = False) -> bool:
        quiet = False
        for _ in range(round(seconds / COUNTED_SECONDS)):
            clock[0] += COUNTED_SECONDS
            quiet = watchdog.is_too_quiet()
        if beat:
            (tmp_path / HEARTBEAT).touch()
            os.utime(tmp_path / HEARTBEAT, ns=(0, next(beats)))
            watchdog.is_too_quiet()
        return quiet

    assert not after(FIRST_SECONDS - 5, beat=True)
    assert not after(100, beat=True)  # the first step, which compiles
    assert not after(4, beat=True)
    assert not after(79) and after(2)  # 20 times 4 seconds
    assert not after(0, beat=True)
    clock[0] += 3600  # this process itself was suspended
    assert not watchdog.is_too_quiet()

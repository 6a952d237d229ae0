"""Leases between machines that share a cache: one holder; a dead one is replaced, and one that comes back drops its result."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_cache import finish, key_for
from small_recipe import ALL_CACHED, Folder
from watched_processes import wait_for, workers_of

from runner.artifacts import SCRATCH
from runner.cache import heartbeat
from runner.cache.heartbeat import Identity, Watch
from runner.cache.leases import FREE, Lease, LeaseLostError, Leases
from runner.cache.store import Store, Waiting

NAME = f"merge-{key_for('leased')}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "DEAD_SECONDS", 0.5)


@pytest.fixture
def as_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on this process is one of another machine; what it holds already stays held by the machine before. With
    `strangers`, also those of this name are taken for others, whose locks are not seen.
    """

    def become(name: str, *, strangers: bool = False) -> None:
        here = Identity(name, name, os.getpid())
        monkeypatch.setattr("runner.cache.heartbeat.this_machine", lambda: here)
        monkeypatch.setattr("runner.cache.store.this_machine", lambda: here)
        monkeypatch.setattr("runner.cache.leases.this_machine", lambda: Identity(name, "another", 1) if strangers else here)

    return become


def once_free(attempt: Callable[[], Any]) -> Any:
    result: list[Any] = []
    wait_for(lambda: isinstance(done := attempt(), Lease) and (result.append(done) or True))
    return result[0]


def silence(leases: Leases) -> None:
    """Stops the heartbeat, as if the process were suspended."""
    stopping = leases._holder._stopping
    assert stopping is not None
    stopping.set()


def test_exactly_one_of_many_processes_gets_a_free_key(tmp_path: Path, as_machine: Any) -> None:
    as_machine("one", strangers=True)
    got: list[Lease] = []
    start = threading.Barrier(8)

    def want(leases: Leases) -> None:
        start.wait()
        if isinstance(lease := leases.try_alone(NAME), Lease):
            got.append(lease)

    threads = [threading.Thread(target=want, args=[Leases(tmp_path)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert [path.name for path in (tmp_path / "leases").iterdir()] == [NAME]


def test_a_live_holder_is_waited_for_by_name(tmp_path: Path, as_machine: Any) -> None:
    as_machine("one")
    first = Leases(tmp_path)
    assert isinstance(first.try_alone(NAME), Lease)
    as_machine("two")
    second = Leases(tmp_path)
    until = time.monotonic() + 3 * heartbeat.DEAD_SECONDS
    wait_for(lambda: second.try_alone(NAME) == f"process {os.getpid()} on one" and time.monotonic() > until)
    assert not second.is_free(NAME)
    first.confirm(NAME)
    assert second.try_alone(NAME) == f"process {os.getpid()} on one"
    first.release(NAME)
    assert isinstance(second.try_alone(NAME), Lease)


def test_exactly_one_of_many_watchers_takes_over_from_a_dead_holder_and_the_dead_one_cannot_finish(
    tmp_path: Path, as_machine: Any
) -> None:
    as_machine("one")
    dead = Leases(tmp_path)
    lease = dead.try_alone(NAME)
    assert isinstance(lease, Lease)
    silence(dead)
    as_machine("two", strangers=True)
    crowd = [Leases(tmp_path) for _ in range(5)]
    got: list[Leases] = []

    def watch(leases: Leases) -> None:
        deadline = time.monotonic() + 8 * heartbeat.DEAD_SECONDS
        while not got and time.monotonic() < deadline:
            if isinstance(leases.try_alone(NAME), Lease):
                got.append(leases)

    threads = [threading.Thread(target=watch, args=[leases]) for leases in crowd]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    lease.look()
    assert lease.lost
    with pytest.raises(LeaseLostError, match="another took over"):
        dead.confirm(NAME)
    dead.release(NAME)
    got[0].confirm(NAME)
    got[0].release(NAME)
    assert (tmp_path / "leases" / NAME / FREE).exists()


def test_time_in_which_a_watcher_was_suspended_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "holder").write_text("1\n{}\n")
    clock = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(heartbeat, "DEAD_SECONDS", 10.0)
    watch = Watch(tmp_path)
    assert not watch.is_dead("holder")
    clock[0] += 3600.0
    assert not watch.is_dead("holder")
    for _ in range(10):
        clock[0] += 1.0
        dead = watch.is_dead("holder")
    assert dead


def test_live_readers_of_another_machine_keep_an_artifact_and_dead_ones_do_not(tmp_path: Path, as_machine: Any) -> None:
    store = Store(tmp_path)
    record = finish(store, "merge", key_for("leased"))
    as_machine("one")
    reader = Store(tmp_path)
    as_machine("two")
    remover = Store(tmp_path)
    as_machine("one")
    with reader.reading([record], waiting=Waiting()):
        as_machine("two")
        with remover.lock_if_free("merge", record.key) as free:
            assert not free
        assert not remover.is_free("merge", record.key)
        silence(reader._leases)
        assert remover.is_free("merge", record.key)
        with remover.lock_if_free("merge", record.key) as free:
            assert free
            as_machine("three")
            assert isinstance(Leases(tmp_path).try_reading(record.name), str)


def test_a_taken_over_key_continues_in_its_renamed_work_folder_that_a_late_holder_cannot_change(
    tmp_path: Path, as_machine: Any
) -> None:
    as_machine("one")
    late = Store(tmp_path)
    key = key_for("leased")
    with late.lock("merge", key, waiting=Waiting()):
        old = late.work("merge", key)
        (old / SCRATCH).mkdir(parents=True)
        with (old / "part").open("w") as growing:
            growing.write("before")
            growing.flush()
            silence(late._leases)
            as_machine("two")
            other = Store(tmp_path)
            with other.lock("merge", key, waiting=Waiting()):
                new = other.work("merge", key)
                assert new.name.startswith(NAME) and new != old and not old.exists()
                growing.write("late")
                growing.flush()
                (old / SCRATCH).mkdir(parents=True)  # by a worker that wakes up with its run
                assert (new / "part").read_text() == "before"
                assert other.work("merge", key) == new
        for late_deed in (late.discard_work, late.confirm):
            with pytest.raises(LeaseLostError):
                late_deed("merge", key)
    assert (new / "part").exists()


def killed_after(steps: int, work: Callable[[], object]) -> bool:
    """Whether a child of this process that does `work` is killed after so many steps on the disk, since it takes more."""
    pid = os.fork()
    if pid == 0:
        left = steps
        on_disk = ("os.rename", "os.remove", "os.mkdir", "open", "shutil.copyfile", "shutil.copystat")

        def step(event: str, arguments: Any) -> None:
            nonlocal left
            left -= event in on_disk
            if left < 0:
                os._exit(9)

        sys.addaudithook(step)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def work_of(root: Path) -> dict[str, tuple[bytes, int]]:
    """The content and the inode of the weights in the current work folder, and of what grows there the content alone."""
    folder = root / "work" / Leases(root).work_name(NAME)
    files = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"
    }
    return {name: (path.read_bytes(), path.stat().st_ino * (path.suffix == ".safetensors")) for name, path in files.items()}


def test_a_takeover_that_is_killed_at_any_step_loses_nothing(
    tmp_path: Path, as_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine after machine takes over from the one before, and is killed one step on the disk later than that."""
    monkeypatch.setattr(heartbeat, "DEAD_SECONDS", 0.0)
    scratch = tmp_path / "work" / NAME / SCRATCH / "step-10"
    scratch.mkdir(parents=True)
    (scratch / "model.safetensors").write_bytes(b"weights" * 1000)
    (scratch / "optimizer.safetensors").write_bytes(b"moments" * 1000)
    (scratch / "training.json").write_text("{}")
    (tmp_path / "work" / NAME / "metrics.jsonl").write_text("{}\n")
    before = work_of(tmp_path)
    assert len(before) == 4
    (tmp_path / "leases" / NAME).mkdir(parents=True)
    (tmp_path / "leases" / NAME / "alone-gone.1").touch()

    def take_over() -> None:
        assert isinstance(Leases(tmp_path).try_alone(NAME), Lease)

    steps = 0
    while killed_after(steps, take_over):
        assert work_of(tmp_path) == before, f"killed after {steps} steps"
        steps += 1
        as_machine(f"machine-{steps}")
    assert work_of(tmp_path) == before
    assert steps > 10
    assert len(list((tmp_path / "work").iterdir())) == 1
    assert not list((tmp_path / "work").rglob("*.tmp"))


def command(folder: Folder, seconds: float = 2.0) -> list[str]:
    quick = f"import sys; from runner.cache import heartbeat; heartbeat.DEAD_SECONDS = {seconds}; heartbeat.BEAT_SECONDS = 0.2"
    return [sys.executable, "-c", f"{quick}; from runner.cli import main; sys.exit(main())", "run", str(folder.recipe)]


def begun(folder: Folder, machine: str, **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "STOCKPOT_CACHE": str(folder.cache), "STOCKPOT_MACHINE": machine}
    return subprocess.Popen(
        command(folder), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, **more
    )


def test_a_suspended_run_is_taken_over_by_another_machine_and_drops_its_result_when_it_wakes_up(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    sleeper = begun(folder, "one")
    wait_for(lambda: list((folder.cache / "work").glob("tokenizer-*/.work/job.json")))
    pids = [sleeper.pid, *(pid for pid in workers_of(folder) if pid != sleeper.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    other = begun(folder, "two")
    _, output = other.communicate()
    assert other.returncode == 0, output
    assert f"tokenizer: waiting for process {sleeper.pid} on one" in output
    digests = [folder.digest(stage) for stage in ALL_CACHED]
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    _, late = sleeper.communicate()
    assert sleeper.returncode == 0, late
    assert "another took over" in late or "made by another run" in late, late
    assert [folder.digest(stage) for stage in ALL_CACHED] == digests
    assert folder.call("verify").returncode == 0
    assert not list((folder.cache / "holders").iterdir())
    shutil.rmtree(folder.cache / "work", ignore_errors=True)
    assert folder.states() == ALL_CACHED


def test_a_killed_run_is_taken_over_by_another_machine(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    killed = begun(folder, "one")
    wait_for(lambda: list((folder.cache / "work").glob("corpus-*/.work/job.json")))
    killed.kill()
    killed.communicate()
    other = begun(folder, "two")
    _, output = other.communicate()
    assert other.returncode == 0, output
    assert folder.states() == ALL_CACHED

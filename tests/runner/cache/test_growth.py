"""Nothing in a cache grows without bound: logs, leases, downloads and proofs go with what they belong to, and several
collections may run at once."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bounded import bounded
from small_cache import finish, key_for
from small_recipe import Folder

from runner.cache.garbage_collection import collect
from runner.cache.record import Record
from runner.cache.run_log import FOLDER
from runner.cache.store import LARGEST_LOG, Store, Waiting
from runner.cli import main
from runner.execution.stage_run import LOG_BYTES, LOG_LINES, StageRun

LONG_AGO = 1_000_000_000.0


def made(store: Store, name: str) -> Record:
    """A finished artifact as a run leaves it, with its log and its lease."""
    with store.lock("merge", key_for(name), waiting=Waiting()):
        return finish(store, "merge", key_for(name))


def note(store: Store, names: list[str], path: str = "") -> None:
    (store.root / FOLDER).mkdir(exist_ok=True)
    (store.root / FOLDER / "mine.json").write_text(json.dumps({"recipe": "mine", "path": path, "time": 1.0, "names": names}))


def test_the_logs_and_leases_of_removed_artifacts_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept, reached, gone = made(store, "kept"), made(store, "reached"), made(store, "gone")
    shutil.rmtree(store.folder("merge", reached.key))
    note(store, [kept.name, reached.name])
    foreign = tmp_path / "logs" / f"{gone.name}.another.log"
    foreign.touch()
    assert main(["gc", "--cache", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "leases").iterdir()} == {kept.name, reached.name}
    assert {path.name.partition(".")[0] for path in (tmp_path / "logs").iterdir()} == {kept.name, reached.name, gone.name}
    assert foreign.exists(), "another machine may have it open"
    os.utime(foreign, (LONG_AGO, LONG_AGO))
    assert main(["gc", "--cache", str(tmp_path)]) == 0
    assert not foreign.exists()
    with store.lock("merge", gone.key, waiting=Waiting()), Store(tmp_path).lock_if_free("merge", gone.key) as free:
        assert not free


def test_a_key_that_is_used_keeps_its_log_and_lease(tmp_path: Path) -> None:
    store = Store(tmp_path)
    note(store, [])
    with store.lock("merge", key_for("busy"), waiting=Waiting()):
        assert main(["gc", "--cache", str(tmp_path)]) == 0
        assert store.log("merge", key_for("busy")).exists()
        store.confirm("merge", key_for("busy"))
    assert main(["gc", "--cache", str(tmp_path)]) == 0
    assert not store.log("merge", key_for("busy")).exists()
    assert not list((tmp_path / "leases").iterdir())


def test_downloads_proofs_and_tokens_that_no_recent_run_uses_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept = made(store, "kept")
    used = tmp_path / "published" / "a--b-1" / "recipe.toml"
    note(store, [kept.name], str(used))
    gone = ["published/a--c-1/recipe.toml", "published/snapshots/a--c-1.json", f"proofs/{key_for('x')}.json"]
    new = ["published/a--d-1/recipe.toml", f"proofs/{key_for('y')}.json"]
    stay = [str(used.relative_to(tmp_path)), f"proofs/{kept.key}.json"]
    for name in [*gone, *new, *stay]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in [*gone, *stay]:
        os.utime(tmp_path / name, (LONG_AGO, LONG_AGO))
        os.utime((tmp_path / name).parent, (LONG_AGO, LONG_AGO))
    assert main(["gc", "--cache", str(tmp_path)]) == 0
    assert [name for name in [*gone, *new, *stay] if (tmp_path / name).exists()] == [*new, *stay]


def test_several_collections_at_once_remove_everything_and_none_fails(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(40):
        made(store, str(number))
        for place in (
            f"aside/x-{number}/a/b",
            f"arriving/merge-{key_for(str(number))}-7",
            f"work/merge-{key_for(f'w{number}')}/.work",
        ):
            (tmp_path / place).mkdir(parents=True)
            for file in range(5):
                (tmp_path / place / f"file-{file}").write_text("x")
    pids = []
    for _ in range(6):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                collect(Store(tmp_path), named=(), forget_runs=True, keep_size=0, dry_run=False)
                code = 0
            except BaseException as error:
                print(repr(error), file=sys.__stderr__, flush=True)
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * len(pids)
    collect(Store(tmp_path), named=(), forget_runs=True, keep_size=0, dry_run=False)
    left = {
        path.relative_to(tmp_path).as_posix()
        for place in ("stages", "work", "aside", "arriving", "leases", "logs")
        for path in (tmp_path / place).iterdir()
    }
    assert left == set()
    assert len(list((tmp_path / "records").iterdir())) == 40


def test_the_end_of_a_huge_log_is_shown_without_reading_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "log").open("wb") as log:
        os.truncate(log.name, 2**36)
        log.seek(0, os.SEEK_END)
        log.write("".join(f"\nline {number}" for number in range(100)).encode())
    with (tmp_path / "log").open("a+b") as log:
        run = StageRun.__new__(StageRun)
        run._log, run._entry = log, SimpleNamespace(name="base")  # type: ignore[assignment]
        run._work = run._scratch = tmp_path
        assert bounded(lambda: print(run._failure(1, 0))) == 0
    said = capfd.readouterr().out
    assert said.count("line ") == LOG_LINES and "line 99" in said and len(said) < LOG_BYTES


def test_a_log_begins_anew_once_it_is_long(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock("merge", key_for("log"), waiting=Waiting()) as log:
        os.truncate(log.name, LARGEST_LOG)
    with store.lock("merge", key_for("log"), waiting=Waiting()) as log:
        assert os.fstat(log.fileno()).st_size == LARGEST_LOG
        os.truncate(log.name, LARGEST_LOG + 1)
    with store.lock("merge", key_for("log"), waiting=Waiting()) as log:
        assert os.fstat(log.fileno()).st_size == 0


def test_a_run_after_a_collection_makes_what_it_needs_again(folder: Folder) -> None:
    assert folder.call("gc", "--keep-size", "0").returncode == 0
    done = folder.run()
    assert done.returncode == 0, done.stderr

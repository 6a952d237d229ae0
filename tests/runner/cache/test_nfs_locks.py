"""A shared cache on NFSv4, by its rules for locks: a shared lock wants a file that is open for reading, an exclusive one a
file that is open for writing, and a server without a lock service answers ENOLCK.

A real mount wants a kernel with NFS; where there is none, the rules are enforced on `flock` itself, in the processes that a
run starts as well.
"""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_cache import finish, key_for
from small_recipe import ALL_CACHED, Folder

from runner.cache.store import Store, Waiting
from runner.cli import main
from runner.file_locks import EXCLUSIVE, SHARED, NoLocksError, is_locked, open_lock, take_lock, try_lock
from runner.hub.receipts import target_lock
from runner.hub.target import Target

RULES = """
import errno, fcntl, os

_flock = fcntl.flock

def flock(file, operation):
    mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    if operation & fcntl.LOCK_SH and mode == os.O_WRONLY or operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    return _flock(file, operation)

fcntl.flock = flock
"""


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # put back afterwards
    exec(RULES, names)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("nfs")
def test_the_rules_are_enforced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open("ab") as file, pytest.raises(OSError, match="Bad file"):
        fcntl.flock(file, fcntl.LOCK_SH)
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Bad file"):
        fcntl.flock(file, fcntl.LOCK_EX)


@pytest.mark.usefixtures("nfs")
def test_a_key_is_locked_read_and_seen_as_held_on_nfs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = finish(store, "merge", key_for("nfs"))
    assert not store.is_held_here("merge", record.key)
    with store.reading([record], waiting=Waiting()), Store(tmp_path).reading([record], waiting=Waiting()):
        assert store.is_held_here("merge", record.key)
        with Store(tmp_path).lock_if_free("merge", record.key) as free:
            assert not free
    with store.lock("merge", record.key, waiting=Waiting()):
        assert store.is_held_here("merge", record.key)
        assert not Store(tmp_path).is_free("merge", record.key)
    assert store.is_free("merge", record.key)
    with target_lock(tmp_path / "receipts", Target("a/b", branch="main", endpoint="e", pull_request=False)):
        pass


def test_a_recipe_runs_and_is_collected_and_verified_on_nfs(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "here")
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "sitecustomize.py").write_text(RULES)
    path = os.pathsep.join([str(tmp_path / "rules"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = folder.call("run", str(folder.recipe), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "Bad file" not in done.stderr
    assert folder.states() == ALL_CACHED
    for words in (["run", str(folder.recipe), "--set", "stage.tokens.context=16"], ["verify"], ["gc", "--keep-size", "0"]):
        done = folder.call(*words, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    "use",
    [
        lambda store, record: store.is_held_here("merge", record.key),
        lambda store, record: store.lock("merge", record.key, waiting=Waiting()).__enter__(),
        lambda store, record: store.reading([record], waiting=Waiting()).__enter__(),
        lambda store, record: store.lock_if_free("merge", record.key).__enter__(),
    ],
)
def test_a_file_system_without_locks_is_named_and_no_key_counts_as_free(
    tmp_path: Path, use: Callable[[Store, Any], Any]
) -> None:
    store = Store(tmp_path)
    record = finish(store, "merge", key_for("none"))
    store.open_log("merge", record.key).close()
    with pytest.raises(NoLocksError, match=r"expected a file system with locks, got 'No locks available' .* --cache"):
        use(store, record)


@pytest.mark.usefixtures("no_locks")
def test_a_run_without_locks_ends_with_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    assert main(["run", str(folder.recipe), "--cache", str(folder.cache)]) == 3
    assert "expected a file system with locks" in capsys.readouterr().err


def test_the_lock_of_a_removed_file_is_not_taken(tmp_path: Path) -> None:
    """Whoever waits for a lock whose file is removed gets that of the new file, so that two never have one."""
    path = tmp_path / "lock"
    first = take_lock(path, EXCLUSIVE)
    assert first is not None and take_lock(path, EXCLUSIVE) is None
    waiting = open_lock(path)
    path.unlink()
    first.close()
    assert try_lock(waiting, EXCLUSIVE), "of the removed file"
    waiting.close()
    second = take_lock(path, EXCLUSIVE)
    assert second is not None and os.path.samestat(os.fstat(second.fileno()), path.stat())
    assert take_lock(path, SHARED) is None and is_locked(path)
    second.close()
    assert not is_locked(path) and not is_locked(tmp_path / "none")


def test_reading_is_enough_to_see_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with open_lock(path) as held:
        assert try_lock(held, EXCLUSIVE)
        path.chmod(0o444)
        code = "import sys; from pathlib import Path; from runner.file_locks import is_locked; "
        code += f"sys.exit(7 * is_locked(Path({str(path)!r})))"
        drop = "import ctypes; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)\n"  # root's right to write what is read-only
        done = subprocess.run([sys.executable, "-c", drop + code])
    assert done.returncode == 7

"""Locks on open files between the processes of a machine.

`flock` is a lock of a byte range where the file lies on NFS. NFSv4 gives a shared one only on a file that is open for reading,
and an exclusive one only on a file that is open for writing; else it answers EBADF. So lock files are opened for both.

A lock file may be removed under its exclusive lock: who gets the lock of a removed file takes that of the new one.
"""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from runner.errors import StageError

SHARED, EXCLUSIVE = fcntl.LOCK_SH, fcntl.LOCK_EX
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL, errno.EIO)


class NoLocksError(StageError):
    """The file system has no working locks."""


def open_lock(path: Path) -> IO[bytes]:
    """The lock file at `path`, opened for reading and for appending; made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+b")


def try_lock(file: IO[bytes], mode: int, *, wait: bool = False) -> bool:
    """Takes a lock until the file is closed, in every process that inherited it; false if another process has it."""
    try:
        fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise NoLocksError(
            f"{file.name}: expected a file system with locks, got {error.strerror!r} for a lock; mount it with its "
            "lock service (NFS: without `nolock`), or choose another place with --cache or STOCKPOT_CACHE"
        ) from error
    return True


def take_lock(path: Path, mode: int) -> IO[bytes] | None:
    """The lock file at `path` with its lock taken; None if another process has it."""
    while True:
        file = open_lock(path)
        try:
            if not try_lock(file, mode):
                file.close()
                return None
            if _is_at(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its file was removed


def is_locked(path: Path) -> bool:
    """Whether a process has the lock of the file at `path`. Writes nothing; a file that cannot be opened counts as locked."""
    try:
        with path.open("r+b") as file:
            return not try_lock(file, EXCLUSIVE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:
        with path.open("rb") as file:  # of a cache that cannot be written: readers do not matter there
            return not try_lock(file, SHARED)
    except PermissionError:
        return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

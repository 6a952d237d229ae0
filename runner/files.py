"""Writing whole files: a file is complete under its final name, and durable where that is asked."""

import errno
import os
import shutil
import stat
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Writes a file atomically: readers see the old or the new one. `durable` waits until the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")  # process ids repeat across machines
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def read_bounded(path: Path, largest: int) -> bytes:
    """The bytes of a file, one more than `largest` at most. OSError at once for something else, such as a pipe or a device, of
    which reading may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        content, left = b"", largest + 1
        while left > 0 and (piece := os.read(descriptor, min(left, max(status.st_size - len(content), 0) + 1))):
            content, left = content + piece, left - len(piece)
        return content
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Puts the content of `source` at `target`, by a hard link where possible, since neither is ever changed in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def fsync(path: Path) -> None:
    """Waits until the disk has a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

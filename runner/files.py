"""Writing whole files: a file is complete under its final name, and durable where that is asked."""

import errno
import os
import shutil
from pathlib import Path

from llm.files import read_bounded as read_bounded

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

"""Writes files and folders that are complete under their final name: under a temporary name first, then renamed."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # this module is also used where torch is not imported
    from torch import Tensor

TEMPORARY = ".tmp"  # ends the name of what is not complete


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` at the end; on an error it is removed, so that a full disk gets no fuller."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, renamed to `path` at the end; on an error it is removed. `path` does not exist by then."""
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def private_folder(path: Path) -> Path:
    """`path`, made for its owner alone where it is missing. PermissionError if another user may have written to it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    kind = "a link" if stat.S_ISLNK(found.st_mode) else "one of another user" if found.st_uid != os.geteuid() else ""
    if kind or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, kind or "one that others can write to", str(path))
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        path.chmod(0o700)
    return path


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` with sorted keys, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: "dict[str, Tensor]") -> None:
    """Write `tensors` to `path` as safetensors. A full disk raises OSError, as it does for any other file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # safetensors gives it only in its message
            if number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it readable by its owner only

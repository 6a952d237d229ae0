"""Which processes of this machine run which recipes on a cache: `run stop` asks them to end."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from runner.cache.run_log import FOLDER
from runner.files import read_bounded, write_whole

LARGEST = 1 << 16  # bytes of a note
SUFFIX = ".pid"


@contextlib.contextmanager
def noted(cache: Path, recipe: Path) -> Iterator[None]:
    """While it lasts, the cache has a note that this process runs `recipe`; a read-only cache is not an error."""
    note = cache / FOLDER / f"{socket.gethostname()}-{os.getpid()}{SUFFIX}"
    about = {"recipe": str(recipe.resolve()), "host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}
    with contextlib.suppress(OSError):
        write_whole(note, json.dumps(about), durable=False)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)


def running(cache: Path, recipe: Path) -> list[int]:
    """The processes of this machine that run `recipe` on `cache`. Notes of processes that have ended are removed."""
    found = []
    for note in sorted((cache / FOLDER).glob(f"{socket.gethostname()}-*{SUFFIX}")):
        try:
            about = json.loads(read_bounded(note, LARGEST))
            pid, began, path = int(about["pid"]), float(about["began"]), str(about["recipe"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # gone, or edited by hand
            continue
        if _began(pid) != began:  # ended, and its number may be that of another process now
            with contextlib.suppress(OSError):
                note.unlink(missing_ok=True)
        elif path == str(recipe.resolve()):
            found.append(pid)
    return found


def _began(pid: int) -> float | None:
    """When a process of this machine began, in seconds since 1970; None if there is none."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None

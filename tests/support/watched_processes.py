"""Waiting for conditions, and finding the workers of a run."""

import time
from collections.abc import Callable
from pathlib import Path

from small_recipe import Folder


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def workers_of(folder: Folder) -> list[int]:
    """Process ids of workers in the folder's cache."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _mentions(path, str(folder.cache))]


def _mentions(path: Path, text: str) -> bool:
    try:
        return text.encode() in path.read_bytes()
    except OSError:
        return False

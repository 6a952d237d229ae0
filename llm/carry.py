"""Carries a training checkpoint to the machines of a group that do not see the disk of the first one."""

import contextlib
import os
import shutil
from pathlib import Path

from llm.group import Group
from llm.training_state import PARTIAL, STATE

CHUNK = 2**24  # bytes


def carry(path: Path, folder: Path, group: Group) -> Path:
    """Where in its own `folder` each process finds the checkpoint that the main one has at `path`.

    Whoever has none with the same digests there gets a copy, once per machine. All processes call this.
    """
    name, state = group.from_main((path.name, (path / STATE).read_bytes() if group.is_main else b""))
    own: Path = folder / name
    if group.least(_has(own, state))[0] == 1:
        return own
    files = group.from_main(sorted(file.name for file in path.iterdir()) if group.is_main else [])
    partial = own.with_name(own.name + PARTIAL)
    writes = not _has(own, state) and os.environ.get("LOCAL_RANK", "0") == "0"
    if writes:
        for old in (partial, own):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
    for file in files:
        _copy(path / file, partial / file if writes else None, group)
    if writes:
        partial.rename(own)
    group.sum(0)  # nobody reads before it is written
    return own


def _has(path: Path, state: bytes) -> bool:
    try:
        return (path / STATE).read_bytes() == state
    except OSError:
        return False


def _copy(source: Path, target: Path | None, group: Group) -> None:
    """Sends a file of the main process to all; who has a `target` writes it."""
    size = group.from_main(source.stat().st_size if group.is_main else 0)
    with contextlib.ExitStack() as files:
        read = files.enter_context(source.open("rb")) if group.is_main else None
        write = files.enter_context(target.open("wb")) if target else None
        for _ in range(0, size, CHUNK):
            chunk: bytes = group.from_main(read.read(CHUNK) if read else b"")
            if write:
                write.write(chunk)

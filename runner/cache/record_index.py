"""The index of the records of a cache: what planning compares new stages with, in one file, so that no record is read for it.

Each line has the name and the inode of a record's file, the kind, a check and the facts. A line counts while that file has
that inode. It is only a memo: what is missing, torn or damaged is read from the records again, lines are added by one write at
the end of the file, and whoever finds more old lines than new ones writes the file anew. So any number of processes may use it
at once, and none waits.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runner.cache.record import DamagedRecordError, Record
from runner.files import read_bounded, write_whole

FILE = "records.index"  # in the cache
LARGEST = 256 * 2**20  # bytes of the index; a fact is some hundred
FACTS = ("kind", "key", "identity", "recipe", "stage", "finished", "seconds", "hardware")
METRICS = ("tokens", "steps", "first_step", "seconds", "flops", "parameters", "peak_memory_bytes")


class _Line(NamedTuple):
    inode: bytes
    kind: bytes
    facts: bytes  # JSON


def indexed_facts(cache: Path, kinds: Collection[str]) -> Iterator[dict[str, Any]]:
    """The facts of every record of some kinds: its fields FACTS, and METRICS of its metrics."""
    present = _present(cache / "records")
    lines, count = _read(cache / FILE)
    new: dict[bytes, _Line] = {}
    for name, inode in present.items():
        line = lines.get(name)
        if line is None or line.inode != inode:
            line = new[name] = _line(cache / "records" / os.fsdecode(name), inode)
        if line.kind.decode() in kinds:
            with contextlib.suppress(ValueError):
                yield json.loads(line.facts)
    if new:
        _add(cache / FILE, {name: lines[name] for name in present if name in lines} | new, new, count)


def _present(folder: Path) -> dict[bytes, bytes]:
    """The inode of each record by its file's name."""
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            return {entry.name: b"%d" % entry.inode() for entry in entries if _is_name(entry.name)}
    except OSError:
        return {}


def _is_name(name: bytes) -> bool:
    return name.endswith(b".json") and not name.startswith(b".") and b" " not in name and b"\n" not in name


def _line(path: Path, inode: bytes) -> _Line:
    """The line of a record, without facts for a damaged one."""
    try:
        data = Record.read(path).data
    except (OSError, DamagedRecordError):
        return _Line(inode, b"?", b"{}")
    facts = {name: data[name] for name in FACTS if name in data}
    facts["metrics"] = {name: data["metrics"][name] for name in METRICS if name in data["metrics"]}
    return _Line(inode, str(data["kind"]).encode(), json.dumps(facts, separators=(",", ":")).encode())


def _read(path: Path) -> tuple[dict[bytes, _Line], int]:
    """The last valid line of each name, and how many lines there are."""
    try:
        content = read_bounded(path, LARGEST)
    except OSError:
        return {}, 0
    found: dict[bytes, _Line] = {}
    lines = content.split(b"\n")
    for line in lines:
        match line.split(b" ", 4):
            case [name, inode, kind, check, facts] if check == _check(facts):
                found[name] = _Line(inode, kind, facts)
    return found, len(lines)


def _check(facts: bytes) -> bytes:
    return hashlib.blake2b(facts, digest_size=8).hexdigest().encode()


def _add(path: Path, live: dict[bytes, _Line], new: dict[bytes, _Line], count: int) -> None:
    """Adds lines to the index; a cache that cannot be written only makes the next planning slower."""
    written = live if count > 2 * len(live) else new
    text = b"".join(
        b"%s %s %s %s %s\n" % (name, line.inode, line.kind, _check(line.facts), line.facts) for name, line in written.items()
    )
    with contextlib.suppress(OSError):
        if written is live:
            write_whole(path, text, durable=False)
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            os.write(descriptor, b"\n" + text)  # after a line that was torn
        finally:
            os.close(descriptor)

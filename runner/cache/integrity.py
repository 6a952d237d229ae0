"""Compares an artifact with its record: files that changed, are missing, or do not belong there."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.artifacts import METRICS, RECORD, digest_file
from runner.cache.record import DamagedRecordError, Record

ARTIFACT_NAME = re.compile(r"(?P<kind>.+?)-(?P<key>[0-9a-f]{64})")
MISSING, LINK, NOTHING = "no such file", "a link", "nothing"


@dataclass(frozen=True)
class Mismatch:
    """One file that differs from the record."""

    artifact: str  # name of its folder
    file: str  # path inside it
    expected: str
    got: str

    @property
    def invalidates(self) -> bool:
        """Whether the artifact is unusable: no stage reads metrics, and the record has a copy."""
        return self.file not in (METRICS, RECORD)

    def __str__(self) -> str:
        """One line."""
        return f"{self.artifact}: {self.file}: expected {self.expected}, got {self.got}"


MapDigests = Callable[[Callable[[Path], str], Iterable[Path]], Iterable[str]]  # `map`, possibly of a pool


def mismatches(folder: Path, record: Record, *, digests: MapDigests = map) -> list[Mismatch]:
    """Every file under `folder` that differs from `record`, sorted. Reads all bytes. Metrics may be missing."""
    expected = record.files | record.attachments
    present = dict(_files(folder))
    names = sorted(name for name in expected.keys() & present.keys())
    actual = dict(zip(names, digests(_digest, [present[name] for name in names]), strict=True))
    actual |= dict.fromkeys(expected.keys() - present.keys() - {METRICS}, MISSING)
    found = [
        Mismatch(record.name, name, f"sha256 {expected[name]}", got)
        for name, got in actual.items()
        if got != f"sha256 {expected[name]}"
    ]
    found += [
        Mismatch(record.name, name, NOTHING, LINK if path.is_symlink() else "a file")
        for name, path in present.items()
        if name not in expected and name != RECORD
    ]
    found += _record_mismatch(folder, record)
    return sorted(found, key=lambda mismatch: mismatch.file)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files and links by their paths inside the folder, without those that begin with a dot: scratch and temporary files."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*files, *links]:
            if not name.startswith("."):
                path = Path(place, name)
                yield path.relative_to(folder).as_posix(), path


def _digest(path: Path) -> str:
    if path.is_symlink():
        return LINK
    if not path.is_file():
        return "something other than a file"
    try:
        return f"sha256 {digest_file(path)}"
    except OSError as error:
        return f"an unreadable file ({error.strerror})"


def _record_mismatch(folder: Path, record: Record) -> Iterator[Mismatch]:
    try:
        found = Record.read(folder / RECORD)
    except DamagedRecordError as error:
        yield Mismatch(record.name, RECORD, error.expected, error.got)
    except OSError as error:
        yield Mismatch(record.name, RECORD, f"seal {record.seal}", error.strerror or MISSING)
    else:
        if found.seal != record.seal:
            yield Mismatch(record.name, RECORD, f"seal {record.seal}", f"seal {found.seal}")

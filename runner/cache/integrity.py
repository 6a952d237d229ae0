"""What differs between an artifact and its record: files that changed, are missing, or should not be there."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.artifacts import METRICS, RECORD, digest_file
from runner.cache.record import DamagedError, Record

NAME = re.compile(r"(?P<kind>.+?)-(?P<key>[0-9a-f]{64})")  # of an artifact's folder
MISSING, LINK, NOTHING = "no such file", "a link", "nothing"


@dataclass(frozen=True)
class Damage:
    """One file that is not what the record says."""

    artifact: str  # name of its folder
    file: str  # path inside it
    expected: str
    found: str

    @property
    def matters(self) -> bool:
        """Whether anything that uses the artifact could read the file: nothing reads metrics, and a record has a copy."""
        return self.file not in (METRICS, RECORD)

    def __str__(self) -> str:
        """One line."""
        return f"{self.artifact}: {self.file}: expected {self.expected}, found {self.found}"


Digests = Callable[[Callable[[Path], str], Iterable[Path]], Iterable[str]]  # `map`, of a pool perhaps


def damages(folder: Path, record: Record, *, digests: Digests = map) -> list[Damage]:
    """Every file under `folder` that differs from `record`, sorted; all bytes are read. Metrics may be absent."""
    expected = record.files | record.attachments
    there = dict(_files(folder))
    names = sorted(name for name in expected.keys() & there.keys())
    found = dict(zip(names, digests(_digest, [there[name] for name in names]), strict=True))
    found |= dict.fromkeys(expected.keys() - there.keys() - {METRICS}, MISSING)
    faults = [
        Damage(record.name, name, f"sha256 {expected[name]}", told)
        for name, told in found.items()
        if told != f"sha256 {expected[name]}"
    ]
    faults += [
        Damage(record.name, name, NOTHING, LINK if path.is_symlink() else "a file")
        for name, path in there.items()
        if name not in expected and name != RECORD
    ]
    faults += _record_damage(folder, record)
    return sorted(faults, key=lambda fault: fault.file)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files and links by their paths inside the folder; scratch and temporary files, which begin with a dot, are not meant."""
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
        return "what is no file"
    try:
        return f"sha256 {digest_file(path)}"
    except OSError as error:
        return f"what cannot be read ({error.strerror})"


def _record_damage(folder: Path, record: Record) -> Iterator[Damage]:
    try:
        found = Record.unsealed((folder / RECORD).read_bytes())
    except DamagedError as error:
        yield Damage(record.name, RECORD, error.expected, error.found)
    except OSError as error:
        yield Damage(record.name, RECORD, f"seal {record.seal}", error.strerror or MISSING)
    else:
        if found.seal != record.seal:
            yield Damage(record.name, RECORD, f"seal {record.seal}", f"seal {found.seal}")

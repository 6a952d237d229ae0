"""The memo of file digests: what lets planning tell whether a file changed without reading it again."""

import contextlib
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.artifacts import digest_file
from runner.files import write_whole
from runner.stage import InputFile

COMPRESSED = (".gz", ".zst")
FRESH_SECONDS = 0.1  # a file changed this recently may change again within one tick of its clock: its digest is not remembered


class DigestMemo:
    """sha256 of files, remembered by (path, size, mtime_ns, inode) so that planning does not read them again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: dict[str, list[Any]] = {}

    @cached_property
    def _known(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        return known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """sha256 of a file; FileNotFoundError if it is not there."""
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        remembered = self._new.get(str(path)) or self._known.get(str(path))
        if remembered and remembered[:3] == stamp:
            return str(remembered[3])
        digest = digest_file(path)
        if time.time() - status.st_mtime > FRESH_SECONDS:
            self._new[str(path)] = [*stamp, digest]
        return digest

    def of_inputs(self, file: InputFile) -> list[list[str]]:
        """[format, digest] of each file that an input means now: what a stage's identity holds of it."""
        return [[_format(path), self.of(path)] for path in file.matches()]

    def save(self) -> None:
        """Writes what was learned; a cache that cannot be written only makes the next planning slower."""
        if not self._new:
            return
        merged = {**self._known, **self._new}
        del self._known
        with contextlib.suppress(OSError):
            write_whole(self._path, json.dumps({path: entry for path, entry in merged.items() if Path(path).exists()}))
        self._new = {}


def _format(path: Path) -> str:
    """What decides how a file is read: its ending, the one before a compression's included."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    return "".join(endings if endings and endings[-1] in COMPRESSED else endings[-1:])

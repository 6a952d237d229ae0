"""The memo of file digests: with it planning detects a changed file without reading every file again."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from runner.artifacts import digest_file
from runner.files import read_bounded, write_whole
from runner.input_files import InputFile, format_of

FRESH_SECONDS = 0.1  # a file changed this recently may change again within one tick of the clock, so it is not remembered
LARGEST = 64 * 2**20  # bytes of the memo
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileContent:
    """The content of an input file. The constraints are for a lock file, which is untrusted."""

    file: Annotated[str, Field(min_length=1, max_length=4096)]  # its path; only the ending is identity
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]

    @property
    def format(self) -> str:
        """The file ending that decides how it is read, such as ".jsonl.gz"."""
        return format_of(PurePosixPath(self.file))


class DigestMemo:
    """sha256 of files, remembered by path, size, times of modification and of change, and inode. With `rereads` nothing that
    was remembered before this process counts.
    """

    rereads = False

    promised: Mapping[str, Sequence[FileContent]] = MappingProxyType({})
    """Contents of missing input files, from a lock file, by the path where they would be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: dict[str, list[Any]] = {}

    @cached_property
    def _known(self) -> dict[str, list[Any]]:
        return {} if self.rereads else self._saved()

    def _saved(self) -> dict[str, list[Any]]:
        try:
            saved = json.loads(read_bounded(self._path, LARGEST))
        except (OSError, ValueError, RecursionError):
            return {}
        return {path: entry for path, entry in saved.items() if _is_entry(entry)} if isinstance(saved, dict) else {}

    def of(self, path: Path) -> str:
        """sha256 of a file; FileNotFoundError if it is missing."""
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        remembered = self._new.get(str(path)) or self._known.get(str(path))
        if remembered and remembered[:-1] == stamp:
            return str(remembered[-1])
        digest = digest_file(path)
        if time.time() - max(status.st_mtime, status.st_ctime) > FRESH_SECONDS:
            self._new[str(path)] = [*stamp, digest]
        return digest

    def of_inputs(self, file: InputFile) -> list[list[str]]:
        """[format, digest] of each file that an input matches, for the stage's identity. On the Hub the commit and path stand
        for the content, so no request is needed.
        """
        if file.hub:
            return [[format_of(PurePosixPath(file.hub.path)), str(file.hub)]]
        return [[content.format, content.sha256] for content in self.contents(file)]

    def contents(self, file: InputFile) -> Sequence[FileContent]:
        """The contents of the files that an input matches; if there are none, the promised ones."""
        here = [FileContent(str(path), self.of(path), path.stat().st_size) for path in file.matches()]
        return here or self.promised.get(str(file.folder / file), ())

    def named_contents(self, files: Iterable[tuple[str, InputFile]], folder: Path) -> dict[str, list[dict[str, Any]]]:
        """The contents of input files by the field that names them, for a lock file; paths are relative to `folder`. Files on
        the Hub are left out, since the recipe pins them.
        """

        def named(file: InputFile, content: FileContent) -> dict[str, Any]:
            written = os.path.relpath(content.file, folder) if Path(content.file).is_absolute() else content.file
            return {**asdict(content), "file": content.file if Path(file).is_absolute() else written}

        return {field: [named(file, content) for content in self.contents(file)] for field, file in files if not file.hub}

    def paths_of(self, sha256: str) -> list[Path]:
        """Known files that still have this digest."""
        paths = [Path(path) for path, (*_, digest) in {**self._known, **self._new}.items() if digest == sha256]
        return [path for path in paths if path.is_file() and self.of(path) == sha256]

    def save(self) -> None:
        """Writes new digests. A read-only cache only makes the next planning slower."""
        if not self._new:
            return
        merged = {**self._saved(), **self._new}  # another process may have added to it
        self._known = merged
        with contextlib.suppress(OSError):
            write_whole(self._path, json.dumps({path: entry for path, entry in merged.items() if Path(path).exists()}))
        self._new = {}


def _is_entry(entry: Any) -> bool:
    """Whether an entry of the memo has the form that `of` writes: four numbers and a digest."""
    return isinstance(entry, list) and len(entry) == 5 and isinstance(entry[-1], str)

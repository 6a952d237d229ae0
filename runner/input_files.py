"""Input files of a recipe: which files a path or glob means, and whether the recipe may read them.

A recipe may come from a stranger, so every path in it must lie in the recipe's own folder or in one that the user allows.
Wildcards do not follow links to folders, so a glob matches only what lies below its part before the first wildcard.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from runner.hub.files import SCHEME, HubFiles

COMPRESSED = (".gz", ".zst")
READABLE = (  # endings of the files that a folder stands for; those of `llm.text.readers`
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md"),
    *(".xlsx", ".xls", ".ods", ".parquet", ".docx", ".pdf"),
)


class Located(str):
    """A string of a recipe that remembers the folder of the file it was written in."""

    folder: Path

    def __new__(cls, text: str, folder: Path) -> "Located":
        """`text` as written in a file of `folder`."""
        self = super().__new__(cls, text)
        self.folder = folder
        return self


class InputFile(Located):
    """A path or glob of input files, relative to the recipe file that holds it. Its content is identity, its name is not.

    A folder stands for all files in and below it that can be read. The files may also be in a dataset on the Hub, at a commit.
    """

    allows_hub: ClassVar[bool] = True  # whether it may be hf://datasets/...

    @property
    def hub(self) -> HubFiles | None:
        """The address of the files on the Hub; None if they are local."""
        return HubFiles.parse(self) if self.startswith(SCHEME) else None

    @property
    def pattern(self) -> str:
        """The absolute glob, escaped where a file with exactly this name exists; on the Hub, the address."""
        if self.hub:
            return str(self)
        if os.path.isfile(self.folder / self):  # noqa: PTH113  # Path.is_file() raises at names that are too long
            return glob.escape(str(self.folder / self))
        return str(Path(glob.escape(str(self.folder)), self))

    def matches(self) -> list[Path]:
        """The local files that match now, sorted by path; empty for files on the Hub."""
        if self.hub:
            return []
        found = {path for path in glob_paths(self.pattern) if os.path.isfile(path)}  # noqa: PTH113
        if not found and os.path.isdir(folder := self.folder / self):  # noqa: PTH112  # as above
            inside = glob_paths(str(Path(glob.escape(str(folder)), "**", "*")))
            found = {path for path in inside if os.path.isfile(path) and format_of(PurePosixPath(path)).startswith(READABLE)}  # noqa: PTH113
        return sorted(found)

    def fetched(self) -> list[Path]:
        """The files for a running stage, sorted by path; those on the Hub are downloaded into its client's cache.

        llm.errors.InputError if the Hub does not provide them.
        """
        if self.hub is None:
            return self.matches()
        from runner.hub.download import download_dataset_files

        return download_dataset_files(self.hub)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def keep_folder(value: Any) -> "InputFile":
            if not isinstance(value, str):
                raise ValueError(f"expected the path of a file, got {type(value).__name__}")
            if not value or "\0" in value:
                raise ValueError(f"expected the path of a file, got {value!r}")
            if value.startswith(SCHEME):
                if not cls.allows_hub:
                    raise ValueError(f"expected a local folder, got {value!r}")
                HubFiles.parse(value)
            return cls(os.path.expanduser(value), getattr(value, "folder", Path.cwd()))  # noqa: PTH111  # Path fails at "~"

        return core_schema.no_info_plain_validator_function(
            keep_folder, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "format": "path"}


class InputFolder(InputFile):
    """A folder of input files, relative to the recipe file that holds it. The content of its files is identity."""

    allows_hub = False

    @property
    def pattern(self) -> str:
        """The absolute path of the folder."""
        return str(self.folder / self)

    def matches(self) -> list[Path]:
        """The files in the folder, sorted by path."""
        return sorted(path for path in Path(self.pattern).glob("*") if path.is_file())


def format_of(path: PurePosixPath) -> str:
    """What decides how a file is read: its ending, with the one before a compression's, as ".jsonl.gz"."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    return "".join(endings if endings and endings[-1] in COMPRESSED else endings[-1:])


@dataclass(frozen=True)
class AllowedFolders:
    """The folders that a recipe may read."""

    recipe: Path  # the folder of the recipe
    others: tuple[Path, ...] = ()  # those that the user allows

    def contain(self, path: Path) -> bool:
        """Whether a path is inside one of them after all links are followed. What is hidden in the user's home folder, such as
        keys and settings, is not the recipe's, even if the recipe was saved there.
        """
        real, own = Path(os.path.realpath(path)), Path(os.path.realpath(self.recipe))
        if any(real.is_relative_to(os.path.realpath(folder)) for folder in self.others):
            return True
        if not real.is_relative_to(own):
            return False
        is_home = Path(os.path.realpath(os.path.expanduser("~"))).is_relative_to(own)  # noqa: PTH111  # Path fails without one
        return not (is_home and any(part.startswith(".") for part in real.relative_to(own).parts))

    def fault(self, found: str, path: Path) -> str:
        """The message for a path that is outside."""
        real = Path(os.path.realpath(path))
        return (
            f"expected a path in the recipe's folder {self.recipe}, got {found!r}, which leads to {real}; if you trust it, "
            f"pass --allow-path {real if real.is_dir() else real.parent}"
        )


def glob_paths(pattern: str) -> Iterator[Path]:
    """The paths that match an absolute glob, possibly repeated; `**` is any number of folders that are not hidden."""
    return _below(*split_pattern(pattern))


def split_pattern(pattern: str) -> tuple[Path, list[str]]:
    """The fixed part of a pattern, and the parts from the first wildcard on."""
    parts = list(Path(pattern).parts)
    fixed = list(takewhile(bool, map(_literal, parts)))
    return Path(*fixed), parts[len(fixed) :]


def _literal(part: str) -> str:
    """The name that a part of a pattern stands for, empty if it has wildcards; `glob.escape` writes * as [*]."""
    plain = re.sub(r"\[([*?[])\]", "", part)
    return "" if glob.has_magic(plain) else re.sub(r"\[([*?[])\]", r"\1", part)


def _below(folder: Path, parts: list[str]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        while rest[:1] == ["**"]:
            rest = rest[1:]
        yield from _below(folder, rest or ["*"])
        for entry in _entries(folder):
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                yield from _below(Path(entry), [part, *rest])
        return
    for entry in _entries(folder):
        hidden = entry.name.startswith(".") and not part.startswith(".")
        if not hidden and fnmatch.fnmatchcase(entry.name, part) and (not rest or entry.is_dir(follow_symlinks=False)):
            yield from _below(Path(entry), rest)


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (OSError, ValueError):  # no folder, or not readable: nothing matches in it
        return []

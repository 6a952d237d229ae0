"""Which files a pattern means, and whether a recipe may read them.

A recipe comes from anybody, so what it names has to lie in its own folder, or in one that the user allows. A wildcard enters
no links to folders: what it can reach is below the part of the pattern before it.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

SCHEME = "hf://"
FORM = "hf://datasets/OWNER/NAME@COMMIT/PATH"
ADDRESS = re.compile(r"hf://datasets/(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^/]*))?/(?P<path>.+)", re.DOTALL)
COMMIT = re.compile(r"[0-9a-f]{40}")
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class HubFiles:
    """A file of a dataset at a commit, or a glob for several."""

    repo: str  # "owner/name"
    commit: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "HubFiles":
        """What an address stands for; ValueError where it is not of the form, or leaves the commit open."""
        match = ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(f"expected {FORM}, got {text!r}")
        repo, revision, path = match["repo"], match["revision"], match["path"]
        if not COMMIT.fullmatch(revision or ""):
            raise ValueError(
                f"expected the commit of {repo} in full (40 hexadecimal digits), so that its rows cannot change behind a result, "
                f"got {repr(revision) if revision else 'none'}. To pin it, take the COMMIT of its branch from "
                f"`git ls-remote https://huggingface.co/datasets/{repo}`, and write hf://datasets/{repo}@COMMIT/{path}"
            )
        if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in path.split("/")):
            raise ValueError(f"expected the path of a file in {repo}, got {path!r}")
        return cls(repo, revision, path)

    def __str__(self) -> str:
        return f"{SCHEME}datasets/{self.repo}@{self.commit}/{self.path}"

    @property
    def is_pattern(self) -> bool:
        """Whether only a list of the dataset's files can tell what it means."""
        return glob.has_magic(self.path)

    @property
    def format(self) -> str:
        """What decides how the files are read: their ending, the one before a compression's included."""
        return format_of(PurePosixPath(self.path))

    def among(self, names: Iterable[str]) -> list[str]:
        """Those of a dataset's files that it means, sorted; `**` is any number of folders, not hidden."""
        wanted = self.path.split("/")
        return sorted(name for name in names if name == self.path or _fits(name.split("/"), wanted))


def format_of(path: PurePosixPath) -> str:
    """The ending of a file's name, the one before a compression's included."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    return "".join(endings if endings and endings[-1] in COMPRESSED else endings[-1:])


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not parts or not wanted:
        return not parts and not wanted
    if wanted[0] == "**":
        deeper = len(parts) > 1 and not parts[0].startswith(".")
        return _fits(parts, wanted[1:] or ["*"]) or (deeper and _fits(parts[1:], wanted))
    hidden = parts[0].startswith(".") and not wanted[0].startswith(".")
    return not hidden and fnmatch.fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def expand(pattern: str) -> Iterator[Path]:
    """What the absolute glob `pattern` means now, some of it more than once; `**` is any number of folders, not hidden."""
    before, after = _split(pattern)
    return _below(before, after)


def fixed_part(pattern: str) -> Path:
    """The part of a pattern before its first wildcard."""
    return _split(pattern)[0]


def leaves_by_name(pattern: str) -> bool:
    """Whether a pattern goes up behind a wildcard, where nobody can tell from what."""
    return ".." in _split(pattern)[1]


@dataclass(frozen=True)
class Bounds:
    """The folders in which a recipe may read."""

    recipe: Path  # the folder of the recipe
    allowed: tuple[Path, ...] = ()  # by the user

    def hold(self, path: Path) -> bool:
        """Whether a path, with all links followed, is inside."""
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(os.path.realpath(folder)) for folder in (self.recipe, *self.allowed))

    def fault(self, found: str, path: Path) -> str:
        """What to say of a path that is outside."""
        real = Path(os.path.realpath(path))
        return (
            f"found {found!r}, which leads to {real}, outside of the recipe's folder {self.recipe}; if you trust it, pass "
            f"--allow-path {real if real.is_dir() else real.parent}"
        )


def _split(pattern: str) -> tuple[Path, list[str]]:
    parts = [_literal(part) or part for part in Path(pattern).parts]
    wild = [_literal(part) is None for part in Path(pattern).parts]
    first = wild.index(True) if True in wild else len(parts)
    return Path(*parts[:first]), list(Path(pattern).parts[first:])


def _literal(part: str) -> str | None:
    """The name that a part of a pattern stands for, None if it holds wildcards; `glob.escape` writes * as [*]."""
    plain = re.sub(r"\[([*?[])\]", "", part)
    return None if glob.has_magic(plain) else re.sub(r"\[([*?[])\]", r"\1", part)


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
    except (OSError, ValueError):  # no folder, or not for us: nothing matches in it
        return []


class Located(str):
    """A string of a recipe that remembers the folder of the file it was written in."""

    folder: Path

    def __new__(cls, text: str, folder: Path) -> "Located":
        """`text` as written in a file of `folder`."""
        self = super().__new__(cls, text)
        self.folder = folder
        return self


class InputFile(Located):
    """A path or glob of input files, relative to the recipe file that holds it. Its content, not its name, is identity.

    A wildcard enters no links to folders. Instead of here, they may lie in a dataset on the Hub, at a commit.
    """

    takes_hub: ClassVar[bool] = True  # whether it may be hf://datasets/...

    @property
    def hub(self) -> HubFiles | None:
        """The files on the Hub that it means; None if they are here."""
        return HubFiles.parse(self) if self.startswith(SCHEME) else None

    @property
    def pattern(self) -> str:
        """The absolute glob; of a file that exists under this very name, a glob for it alone. On the Hub, its address."""
        if self.hub:
            return str(self)
        if os.path.isfile(self.folder / self):  # noqa: PTH113  # Path.is_file() raises at names that are too long
            return glob.escape(str(self.folder / self))
        return str(Path(glob.escape(str(self.folder)), self))

    def matches(self) -> list[Path]:
        """The files it means now, sorted by path; none where they lie on the Hub."""
        if self.hub:
            return []
        return sorted({path for path in expand(self.pattern) if os.path.isfile(path)})  # noqa: PTH113

    def fetched(self) -> list[Path]:
        """The files as a running stage reads them, sorted by path; what lies on the Hub is fetched into its client's cache.

        llm.errors.InputError where the Hub does not give it.
        """
        if self.hub is None:
            return self.matches()
        from runner.hub.download import fetch_rows

        return fetch_rows(self.hub)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def keep_folder(value: Any) -> "InputFile":
            if not isinstance(value, str):
                raise ValueError(f"expected the path of a file, got {type(value).__name__}")
            if not value or "\0" in value:
                raise ValueError(f"expected the path of a file, got {value!r}")
            if value.startswith(SCHEME):
                if not cls.takes_hub:
                    raise ValueError(f"expected a folder here, got {value!r}")
                HubFiles.parse(value)
            return cls(value, getattr(value, "folder", Path.cwd()))

        return core_schema.no_info_plain_validator_function(
            keep_folder, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "format": "path"}

"""Which files a pattern means, and whether a recipe may read them.

A recipe comes from anybody, so what it names has to lie in its own folder, or in one that the user allows. A wildcard enters
no links to folders: what it can reach is below the part of the pattern before it.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


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

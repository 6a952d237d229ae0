"""The address of files in a dataset on the Hub: `hf://datasets/OWNER/NAME@COMMIT/PATH`, where PATH may be a glob.

`runner.hub.download` downloads them.
"""

import fnmatch
import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SCHEME = "hf://"
FORM = "hf://datasets/OWNER/NAME@COMMIT/PATH"
ADDRESS = re.compile(r"hf://datasets/(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^/]*))?/(?P<path>.+)", re.DOTALL)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFiles:
    """A file of a dataset at a commit, or a glob for several."""

    repo: str  # "owner/name"
    commit: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "HubFiles":
        """Read an address; ValueError if it does not have the form above or does not pin a commit."""
        match = ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(f"expected {FORM}, got {text!r}")
        repo, revision, path = match["repo"], match["revision"], match["path"]
        if not COMMIT.fullmatch(revision or ""):
            raise ValueError(
                f"expected the full commit of {repo} (40 hexadecimal digits), so that the rows behind a result cannot change, "
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
        """Whether the path is a glob, so that the dataset's list of files is needed to resolve it."""
        return glob.has_magic(self.path)

    def matching(self, names: Iterable[str]) -> list[str]:
        """Those of a dataset's file `names` that match the path, sorted; `**` is any number of folders that are not hidden."""
        pattern = self.path.split("/")
        return sorted(name for name in names if name == self.path or _matches(name.split("/"), pattern))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not parts or not pattern:
        return not parts and not pattern
    if pattern[0] == "**":
        deeper = len(parts) > 1 and not parts[0].startswith(".")
        return _matches(parts, pattern[1:] or ["*"]) or (deeper and _matches(parts[1:], pattern))
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return not hidden and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])

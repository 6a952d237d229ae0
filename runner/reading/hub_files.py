"""Files of a dataset on the Hugging Face Hub, as a recipe names them: `hf://datasets/OWNER/NAME@COMMIT/PATH`.

The commit makes the name stand for one content for ever, so planning knows what it means without asking anybody. Nothing here
talks to the Hub; that is `runner.hub.dataset`.
"""

import fnmatch
import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

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
            raise ValueError(f"wants {FORM}, found {text!r}")
        repo, revision, path = match["repo"], match["revision"], match["path"]
        if not COMMIT.fullmatch(revision or ""):
            raise ValueError(
                f"wants the commit of {repo} in full (40 hexadecimal digits), so that its rows cannot change behind a result; "
                f"found {repr(revision) if revision else 'none'}. To pin it, take the COMMIT of its branch from "
                f"`git ls-remote https://huggingface.co/datasets/{repo}`, and write hf://datasets/{repo}@COMMIT/{path}"
            )
        if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in path.split("/")):
            raise ValueError(f"wants the path of a file in {repo}, found {path!r}")
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

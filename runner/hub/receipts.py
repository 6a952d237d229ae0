"""Receipts: what was pushed where, on disk. Planning decides by them alone whether a push is due, and touches no network.

receipts/<hash of the target>.json    a journal: the newest receipt is last, and says where the branch was left
receipts/<hash of the target>.lock    held while something is pushed there
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from runner.files import write_whole
from runner.hub.target import Target


@dataclass(frozen=True)
class Receipt:
    """One push, or one rollback."""

    digest: str  # of the release; "" where a rollback went to a commit that was not pushed from here
    commit: str  # that the branch (or the pull request) stood at afterwards
    url: str
    time: str  # ISO 8601
    tag: str | None = None
    files: tuple[str, ...] = ()  # of the release, by their paths in the repository
    restores: str | None = None  # of a rollback: the commit whose content it brought back


@dataclass(frozen=True)
class Journal:
    """All receipts of one target, in order."""

    target: Target
    receipts: tuple[Receipt, ...] = ()
    bases: tuple[str, ...] = field(default=())  # commits at which branches were created from here

    @classmethod
    def read(cls, folder: Path, target: Target) -> Self:
        """The journal of a target; an empty one if nothing was pushed there."""
        try:
            found = json.loads(_path(folder, target).read_text(encoding="utf-8"))
            receipts = [Receipt(**{**one, "files": tuple(one["files"])}) for one in found["receipts"]]
            return cls(target, tuple(receipts), tuple(found["bases"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return cls(target)

    def write(self, folder: Path) -> None:
        """Save it."""
        write_whole(_path(folder, self.target), json.dumps(asdict(self), indent=2))

    def with_receipt(self, receipt: Receipt) -> Self:
        """The journal with one more receipt."""
        return type(self)(self.target, (*self.receipts, receipt), self.bases)

    def with_base(self, commit: str) -> Self:
        """The journal after a branch was begun at a commit."""
        return type(self)(self.target, self.receipts, (*self.bases, commit))

    @property
    def last(self) -> Receipt | None:
        """Where the branch was left."""
        return self.receipts[-1] if self.receipts else None

    def pushes_of(self, digest: str) -> list[Receipt]:
        """The pushes of a release."""
        return [receipt for receipt in self.receipts if receipt.digest == digest and receipt.restores is None]

    def before_last(self) -> Receipt | None:
        """The push of the release before the one that the branch was left at; rollbacks count as what they brought back."""
        if self.last is None:
            return None
        origin = self.last.restores or self.last.commit
        places = [place for place, receipt in enumerate(self.receipts) if receipt.commit == origin]
        earlier = self.receipts[: places[0]] if places else self.receipts
        pushes = [one for one in earlier if one.restores is None and one.digest != self.last.digest]
        return pushes[-1] if pushes else None


def known_commits(folder: Path) -> set[str]:
    """Every commit that was made from here: a branch that stands at one of them was changed by nobody else."""
    known: set[str] = set()
    for path in folder.glob("*.json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known.update(found["bases"], (receipt["commit"] for receipt in found["receipts"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return known


@contextmanager
def held(folder: Path, target: Target) -> Iterator[None]:
    """Lets one process at a time push to a target."""
    folder.mkdir(parents=True, exist_ok=True)
    with _path(folder, target).with_suffix(".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _path(folder: Path, target: Target) -> Path:
    what = [target.endpoint, target.repo, target.branch, target.pull_request]
    return folder / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()}.json"

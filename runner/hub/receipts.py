"""Receipts of pushes, on disk. Planning decides by them alone, without the network, whether a push is due.

receipts/<hash of the target>.json    a journal; the last receipt is the newest
receipts/<hash of the target>.lock    held during a push to the target
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from runner.file_locks import EXCLUSIVE, open_lock, try_lock
from runner.files import read_bounded, write_whole
from runner.hub.target import Target

LARGEST = 64 * 2**20  # bytes of a journal


@dataclass(frozen=True)
class Receipt:
    """One push or rollback."""

    digest: str  # of the release; "" after a rollback to a commit that was not pushed from here
    commit: str  # of the branch or the pull request afterwards
    url: str
    time: str  # ISO 8601
    tag: str | None = None
    files: tuple[str, ...] = ()  # of the release, paths in the repository
    restores: str | None = None  # of a rollback: the commit whose content it restored


@dataclass(frozen=True)
class Journal:
    """All receipts of one target, in order."""

    target: Target
    receipts: tuple[Receipt, ...] = ()
    bases: tuple[str, ...] = field(default=())  # commits from which branches were created here

    @classmethod
    def read(cls, folder: Path, target: Target) -> Self:
        """The journal of a target; an empty one if nothing was pushed there."""
        try:
            journal = json.loads(read_bounded(_path(folder, target), LARGEST))
            receipts = [Receipt(**{**receipt, "files": tuple(receipt["files"])}) for receipt in journal["receipts"]]
            return cls(target, tuple(receipts), tuple(journal["bases"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return cls(target)

    def write(self, folder: Path) -> None:
        """Saves the journal."""
        write_whole(_path(folder, self.target), json.dumps(asdict(self), indent=2))

    def with_receipt(self, receipt: Receipt) -> Self:
        """The journal with one more receipt."""
        return type(self)(self.target, (*self.receipts, receipt), self.bases)

    def with_base(self, commit: str) -> Self:
        """The journal after a branch was created from a commit."""
        return type(self)(self.target, self.receipts, (*self.bases, commit))

    @property
    def last(self) -> Receipt | None:
        """The newest receipt."""
        return self.receipts[-1] if self.receipts else None

    def pushes_of(self, digest: str) -> list[Receipt]:
        """The pushes of a release."""
        return [receipt for receipt in self.receipts if receipt.digest == digest and receipt.restores is None]

    def before_last(self) -> Receipt | None:
        """The push of the release before the last one; a rollback counts as the push that it restored."""
        if self.last is None:
            return None
        origin = self.last.restores or self.last.commit
        places = [place for place, receipt in enumerate(self.receipts) if receipt.commit == origin]
        earlier = self.receipts[: places[0]] if places else self.receipts
        pushes = [receipt for receipt in earlier if receipt.restores is None and receipt.digest != self.last.digest]
        return pushes[-1] if pushes else None


def known_commits(folder: Path) -> set[str]:
    """Every commit that was made from here; a branch at one of them has no changes by others."""
    known: set[str] = set()
    for path in folder.glob("*.json"):
        try:
            journal = json.loads(read_bounded(path, LARGEST))
            known.update(journal["bases"], (receipt["commit"] for receipt in journal["receipts"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return known


@contextmanager
def target_lock(folder: Path, target: Target) -> Iterator[None]:
    """Allows one process at a time to push to a target."""
    with open_lock(_path(folder, target).with_suffix(".lock")) as file:
        try_lock(file, EXCLUSIVE, wait=True)
        yield


def _path(folder: Path, target: Target) -> Path:
    identity = [target.endpoint, target.repo, target.branch, target.pull_request]
    return folder / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.json"

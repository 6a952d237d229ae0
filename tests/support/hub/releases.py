"""Small releases for the test Hub."""

import hashlib
from pathlib import Path
from typing import Any

from hub_server import OWNER, File, Hub

from runner.hub.push import PushRequest, push
from runner.hub.receipts import Receipt
from runner.hub.retries import Retries
from runner.hub.target import Target

AT_ONCE = Retries(sleep=lambda seconds: None)
REPO = f"{OWNER}/model"
CARD = "---\nlicense: mit\n---\n# A model\n"
MADE_BY_THE_HUB = ".gitattributes"


class Releases:
    """Makes and pushes releases; the receipts are in `receipts`."""

    def __init__(self, root: Path, hub: Hub) -> None:
        self.root, self.hub, self.receipts = root, hub, root / "receipts"

    def make(self, version: str, *more: str) -> dict[str, Path]:
        """The files of a release: three small ones, one large one, and small ones named by `more`."""
        folder = self.root / f"release-{version}"
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(f"{CARD}{version}")
        for name in ("config.json", "recipe.lock.json"):
            (folder / name).write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40 + version.encode())
        for name in more:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(version)
        return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    def order(self, version: str, *more: str, **changes: Any) -> PushRequest:
        place = {name: changes.pop(name) for name in ("repo", "branch", "pull_request") if name in changes}
        target = Target(**{"repo": REPO, "endpoint": self.hub.url, **place})
        return PushRequest(self.root, self.make(version, *more), digest_of(version), target, **changes)

    def push(self, version: str, *more: str, overwrite: bool = False, retries: Retries = AT_ONCE, **changes: Any) -> Receipt:
        order = self.order(version, *more, **changes)
        return push(order, receipts=self.receipts, overwrite=overwrite, retries=retries)

    def content(self, version: str) -> dict[str, bytes]:
        """The files of a commit with the release."""
        return {name: path.read_bytes() for name, path in self.make(version).items()}


def digest_of(version: str) -> str:
    return hashlib.sha256(version.encode()).hexdigest()


def held_by(hub: Hub, revision: str = "main", repo: str = REPO) -> dict[str, bytes]:
    """The files of a revision, by name."""
    commit = hub.repositories[repo].at(revision)
    assert commit is not None
    return {name: file.data for name, file in commit.files.items() if name != MADE_BY_THE_HUB}


def summaries(hub: Hub, repo: str = REPO) -> list[str]:
    """The commit messages, oldest first."""
    return [commit.summary for commit in hub.repositories[repo].commits.values()]


def somebody_commits(hub: Hub, repo: str = REPO, branch: str = "main") -> None:
    """Another person adds a file."""
    repository = hub.repositories[repo]
    files = repository.commits[repository.branches[branch]].files
    repository.commit(branch, "A nicer card", {**files, "NOTES.md": File(b"mine", lfs=False)}, author="grace")

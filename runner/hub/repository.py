"""The files of a branch on the Hub, and whether someone else changed the branch since the last push from here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.artifacts import digest_file
from runner.errors import StageError
from runner.hub.target import Target

if TYPE_CHECKING:
    from huggingface_hub import HfApi

INITIAL_FILES = frozenset({".gitattributes"})  # that the Hub puts into every new repository
SHOWN = 12  # characters of a commit in messages


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit."""

    size: int
    oid: str  # sha256 of a large file, else the git blob id

    @property
    def is_large(self) -> bool:
        """Whether it is stored outside git, by its sha256."""
        return len(self.oid) == 64


Files = Mapping[str, RemoteFile]


class LocalFiles:
    """The files of a release, by their paths in the repository; each is hashed once."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = dict(sorted(paths.items()))
        self._oids: dict[tuple[str, bool], str] = {}

    def are_in(self, remote: Files, *, without: frozenset[str] = frozenset()) -> bool:
        """Whether a commit has all of these files unchanged, and none of those in `without`."""
        return not without & remote.keys() and all(name in remote and self._equals(name, remote[name]) for name in self.paths)

    def _equals(self, name: str, remote: RemoteFile) -> bool:
        if self.paths[name].stat().st_size != remote.size:
            return False
        known = (name, remote.is_large)
        if known not in self._oids:
            self._oids[known] = digest_file(self.paths[name]) if remote.is_large else _git_oid(self.paths[name])
        return self._oids[known] == remote.oid


@dataclass(frozen=True)
class Branch:
    """The head of a branch."""

    repo: str  # "owner/name"
    commit: str
    files: Files

    @property
    def is_empty(self) -> bool:
        """Whether it has no files but the initial ones."""
        return not self.files.keys() - INITIAL_FILES


def files_at(api: "HfApi", repo: str, commit: str) -> Files:
    """The files of a commit, including those in folders."""
    from huggingface_hub.hf_api import RepoFile

    found: dict[str, RemoteFile] = {}
    for entry in api.list_repo_tree(repo, recursive=True, revision=commit):
        if isinstance(entry, RepoFile):
            found[entry.path] = RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
    return found


def full_name(api: "HfApi", repo: str) -> str:
    """The repository with its owner, by default the owner of the token."""
    return repo if "/" in repo else f"{api.whoami()['name']}/{repo}"


def refuse_if_changed(api: "HfApi", branch: Branch, target: Target, *, known: set[str], last: str | None) -> None:
    """StageError if the branch is at a commit that was not made from here, unless it is empty."""
    if branch.commit in known or branch.is_empty:
        return
    newest = api.list_repo_commits(branch.repo, revision=branch.commit)[0]
    authors = f" by {', '.join(newest.authors)}" if newest.authors else ""
    since = f"since {last[:SHOWN]} was pushed from here" if last else "and nothing was pushed there from this cache"
    raise StageError(
        f"{target} was changed by somebody else: it is at {branch.commit[:SHOWN]} of {newest.created_at:%Y-%m-%d %H:%M %Z}"
        f"{authors}, {newest.title!r}, {since}. Nothing was pushed; pass --overwrite to replace that commit's files"
    )


def _git_oid(path: Path) -> str:
    from huggingface_hub.utils.sha import git_hash

    return git_hash(path.read_bytes())

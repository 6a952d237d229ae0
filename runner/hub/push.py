"""Pushes a release to the Hub in one atomic commit, and writes a receipt.

Every attempt first checks the repository. So an attempt whose response was lost counts as done if the release is there, large
files that arrived are not sent again, and two pushes cannot mix: a commit names its parent, and the Hub refuses it if the
branch has moved.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.credentials import token
from runner.errors import StageError, StockpotError
from runner.hub.receipts import Journal, Receipt, known_commits, target_lock
from runner.hub.repository import SHOWN, Branch, Files, LocalFiles, files_at, full_name, refuse_if_changed
from runner.hub.retries import DEFAULT_RETRIES, Retries, describe, quiet_client, with_retries
from runner.hub.target import Target, how_to_push

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.hf_api import GitRefs

NEWEST_PULL_REQUESTS = 10  # searched for a release that was proposed before


@dataclass(frozen=True)
class PushRequest:
    """A release and its target."""

    folder: Path  # for messages
    files: Mapping[str, Path]  # path in the repository -> file
    digest: str  # of the release
    target: Target
    private: bool = True  # a newly created repository
    tag: str | None = None  # for the commit


def push(request: PushRequest, *, receipts: Path, overwrite: bool = False, retries: Retries = DEFAULT_RETRIES) -> Receipt:
    """Pushes a release in one commit; returns the receipt that it writes.

    Creates the repository and the branch if they are missing. Files that are there already are not sent again. StageError if
    the Hub refuses or cannot be reached, or if someone else changed the branch and `overwrite` is false; then nothing of the
    release is visible.
    """
    secret = token()
    if secret is None:
        raise StageError(how_to_push(request.target))
    from huggingface_hub import HfApi

    api = HfApi(endpoint=request.target.endpoint, token=secret)
    with target_lock(receipts, request.target), quiet_client():
        attempt = _Attempt(api, request, LocalFiles(request.files), receipts, overwrite)
        try:
            receipt = with_retries(attempt.run, retries)
        except StockpotError:
            raise
        except Exception as error:  # the client may raise anything; the release itself is finished
            raise StageError(
                f"pushing {request.folder} to {request.target} failed ({describe(error)}); the release is finished, and the "
                "next run pushes it"
            ) from None
        Journal.read(receipts, request.target).with_receipt(receipt).write(receipts)
    return receipt


@dataclass
class _Attempt:
    """One attempt at a push, which first checks the repository."""

    api: "HfApi"
    request: PushRequest
    files: LocalFiles
    receipts: Path
    overwrite: bool

    def run(self) -> Receipt:
        request = self.request
        repo = full_name(self.api, request.target.repo)
        self.api.create_repo(repo, private=request.private, exist_ok=True)
        refs = self.api.list_repo_refs(repo, include_pull_requests=request.target.pull_request)
        branch = self._branch(repo, refs)
        if request.target.pull_request:
            return self._receipt(*self._proposed(branch, refs))
        self._check_tag(repo, refs, branch)
        commit, url = self._pushed(branch)
        self._tagged(repo, refs, commit)
        return self._receipt(commit, url)

    def _branch(self, repo: str, refs: "GitRefs") -> Branch:
        """The head of the target's branch, which is created from main if it is missing."""
        heads = {branch.name: branch.target_commit for branch in refs.branches}
        name = self.request.target.branch
        if name not in heads:
            base = heads.get("main") or str(self.api.repo_info(repo).sha)
            if name != "main":
                Journal.read(self.receipts, self.request.target).with_base(base).write(self.receipts)
                self.api.create_branch(repo, branch=name, revision=base, exist_ok=True)
            heads[name] = base
        return Branch(repo, heads[name], files_at(self.api, repo, heads[name]))

    def _pushed(self, branch: Branch) -> tuple[str, str]:
        """The commit of the branch with the release, and its address; made unless it exists."""
        journal = Journal.read(self.receipts, self.request.target)
        stale = self._stale(branch.files, journal)
        if self.files.are_in(branch.files, without=stale):
            return branch.commit, f"{self.request.target.endpoint}/{branch.repo}/commit/{branch.commit}"
        if not self.overwrite:
            last = journal.last.commit if journal.last else None
            known = known_commits(self.receipts)
            refuse_if_changed(self.api, branch, self.request.target, known=known, last=last)
        made = self._commit(branch, stale)
        return made.oid, str(made.commit_url)

    def _proposed(self, branch: Branch, refs: "GitRefs") -> tuple[str, str]:
        """The commit of a pull request with the release, and its address; made unless it or the branch has the release."""
        place = f"{self.request.target.endpoint}/{branch.repo}"
        if self.files.are_in(branch.files):
            return branch.commit, f"{place}/commit/{branch.commit}"
        proposals = {int(ref.ref.rpartition("/")[2]): ref.target_commit for ref in refs.pull_requests or ()}
        for number in sorted(proposals, reverse=True)[:NEWEST_PULL_REQUESTS]:
            if self.files.are_in(files_at(self.api, branch.repo, proposals[number])):
                return proposals[number], f"{place}/discussions/{number}"
        made = self._commit(branch, frozenset())
        return made.oid, str(made.pr_url)

    def _commit(self, branch: Branch, stale: frozenset[str]) -> "CommitInfo":
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [CommitOperationAdd(name, path) for name, path in self.files.paths.items()]
        return self.api.create_commit(
            branch.repo,
            [*additions, *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=f"Release {self.request.digest[:12]}",
            revision=self.request.target.branch,
            create_pr=self.request.target.pull_request,
            parent_commit=branch.commit,
        )

    def _stale(self, remote: Files, journal: Journal) -> frozenset[str]:
        """Files of earlier releases that this one does not have."""
        pushed = {name for receipt in journal.receipts for name in receipt.files}
        return frozenset((pushed - self.files.paths.keys()) & remote.keys())

    def _check_tag(self, repo: str, refs: "GitRefs", branch: Branch) -> None:
        """StageError, before anything is pushed, if the tag marks another release."""
        marked = _marked(refs, self.request.tag)
        if marked is None or self.overwrite or (marked == branch.commit and self.files.are_in(branch.files)):
            return
        if not self.files.are_in(files_at(self.api, repo, marked)):
            raise StageError(
                f"{self.request.target}: the tag {self.request.tag!r} marks another release, "
                f"{marked[:SHOWN]}; choose another tag, "
                "or pass --overwrite to move it. Nothing was pushed"
            )

    def _tagged(self, repo: str, refs: "GitRefs", commit: str) -> None:
        """Tags the commit if a tag is given; a tag on another commit with the same files stays."""
        tag = self.request.tag
        marked = _marked(refs, tag)
        if tag is None or marked == commit:
            return
        if marked is not None:
            if self.files.are_in(files_at(self.api, repo, marked)):
                return
            self.api.delete_tag(repo, tag=tag)
        self.api.create_tag(repo, tag=tag, revision=commit, exist_ok=True)

    def _receipt(self, commit: str, url: str) -> Receipt:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Receipt(self.request.digest, commit, url, now, tag=self.request.tag, files=tuple(self.files.paths))


def _marked(refs: "GitRefs", tag: str | None) -> str | None:
    """The commit that a tag marks."""
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)

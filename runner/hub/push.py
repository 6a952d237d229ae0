"""Pushing a release to the Hub: one commit, complete or not there, and a receipt that says it was done.

Every attempt first looks at what the repository holds. So an attempt whose answer was lost counts as done once the release is
found there, large files that arrived are not sent again (the Hub says which it has), and two pushes cannot mix: a commit names
its parent, and the Hub refuses it if the branch has moved.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.credentials import token
from runner.errors import StageError, StockpotError
from runner.hub.receipts import Journal, Receipt, held, known_commits
from runner.hub.repository import SHOWN, Branch, Files, LocalFiles, files_at, full_name, refuse_if_changed
from runner.hub.retries import PATIENT, Retries, attempted, quiet, told
from runner.hub.target import Target, how_to_push

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.hf_api import GitRefs

PULL_REQUESTS_LOOKED_AT = 10  # the newest


@dataclass(frozen=True)
class Order:
    """What is to be pushed, and where."""

    folder: Path  # for messages
    files: Mapping[str, Path]  # path in the repository -> file
    digest: str  # of the release
    target: Target
    private: bool = True  # whether a repository that has to be created is
    tag: str | None = None  # for the commit


def push(order: Order, *, receipts: Path, overwrite: bool = False, retries: Retries = PATIENT) -> Receipt:
    """Puts the release there in one commit and writes the receipt, which it returns.

    The repository and the branch are created if they are not there. What is there already, of this or an earlier attempt, is
    not sent again. StageError if the Hub refuses or cannot be reached, or if somebody else has changed the branch and
    `overwrite` does not allow to go over that; nothing is visible of the release then.
    """
    secret = token()
    if secret is None:
        raise StageError(how_to_push(order.target))
    from huggingface_hub import HfApi

    api = HfApi(endpoint=order.target.endpoint, token=secret)
    with held(receipts, order.target), quiet():
        attempt = _Attempt(api, order, LocalFiles(order.files), receipts, overwrite)
        try:
            receipt = attempted(attempt.run, retries)
        except StockpotError:
            raise
        except Exception as error:  # whatever the client and the layers below it raise, the release itself is finished
            raise StageError(
                f"pushing {order.folder} to {order.target} did not succeed ({told(error)}); the release is finished, and the "
                "next run pushes it"
            ) from None
        Journal.read(receipts, order.target).with_receipt(receipt).write(receipts)
    return receipt


@dataclass
class _Attempt:
    """One way through; looks first at what is there."""

    api: "HfApi"
    order: Order
    files: LocalFiles
    receipts: Path
    overwrite: bool

    def run(self) -> Receipt:
        order = self.order
        repo = full_name(self.api, order.target.repo)
        self.api.create_repo(repo, private=order.private, exist_ok=True)
        refs = self.api.list_repo_refs(repo, include_pull_requests=order.target.pull_request)
        branch = self._branch(repo, refs)
        if order.target.pull_request:
            return self._receipt(*self._proposed(branch, refs))
        self._check_tag(repo, refs, branch)
        commit, url = self._pushed(branch)
        self._tagged(repo, refs, commit)
        return self._receipt(commit, url)

    def _branch(self, repo: str, refs: "GitRefs") -> Branch:
        """The head of the target's branch, which is begun at that of main if it is not there."""
        heads = {branch.name: branch.target_commit for branch in refs.branches}
        wanted = self.order.target.branch
        if wanted not in heads:
            base = heads.get("main") or str(self.api.repo_info(repo).sha)
            if wanted != "main":
                Journal.read(self.receipts, self.order.target).with_base(base).write(self.receipts)
                self.api.create_branch(repo, branch=wanted, revision=base, exist_ok=True)
            heads[wanted] = base
        return Branch(repo, heads[wanted], files_at(self.api, repo, heads[wanted]))

    def _pushed(self, branch: Branch) -> tuple[str, str]:
        """The commit of the branch that holds the release, and its address; made unless it is there."""
        journal = Journal.read(self.receipts, self.order.target)
        stale = self._stale(branch.files, journal)
        if self.files.are_in(branch.files, without=stale):
            return branch.commit, f"{self.order.target.endpoint}/{branch.repo}/commit/{branch.commit}"
        if not self.overwrite:
            last = journal.last.commit if journal.last else None
            known = known_commits(self.receipts)
            refuse_if_changed(self.api, branch, self.order.target, known=known, last=last)
        made = self._commit(branch, stale)
        return made.oid, str(made.commit_url)

    def _proposed(self, branch: Branch, refs: "GitRefs") -> tuple[str, str]:
        """The commit of a pull request that holds the release, and its address; made unless it, or the branch itself, does."""
        place = f"{self.order.target.endpoint}/{branch.repo}"
        if self.files.are_in(branch.files):
            return branch.commit, f"{place}/commit/{branch.commit}"
        proposals = {int(ref.ref.rpartition("/")[2]): ref.target_commit for ref in refs.pull_requests or ()}
        for number in sorted(proposals, reverse=True)[:PULL_REQUESTS_LOOKED_AT]:
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
            commit_message=f"Release {self.order.digest[:12]}",
            revision=self.order.target.branch,
            create_pr=self.order.target.pull_request,
            parent_commit=branch.commit,
        )

    def _stale(self, there: Files, journal: Journal) -> frozenset[str]:
        """What is there of the releases before, and not in this one."""
        ours = {name for receipt in journal.receipts for name in receipt.files}
        return frozenset((ours - self.files.paths.keys()) & there.keys())

    def _check_tag(self, repo: str, refs: "GitRefs", branch: Branch) -> None:
        """StageError, before anything is pushed, if the tag marks another release."""
        marked = _marked(refs, self.order.tag)
        if marked is None or self.overwrite or (marked == branch.commit and self.files.are_in(branch.files)):
            return
        if not self.files.are_in(files_at(self.api, repo, marked)):
            raise StageError(
                f"{self.order.target}: the tag {self.order.tag!r} marks {marked[:SHOWN]}, which is another release; give this "
                "one a tag of its own, or pass --overwrite to move that one. Nothing was pushed"
            )

    def _tagged(self, repo: str, refs: "GitRefs", commit: str) -> None:
        """Marks the commit, if that is wanted; a tag on another commit with the same files stays where it is."""
        tag = self.order.tag
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
        return Receipt(self.order.digest, commit, url, now, tag=self.order.tag, files=tuple(self.files.paths))


def _marked(refs: "GitRefs", tag: str | None) -> str | None:
    """The commit that a tag marks."""
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)

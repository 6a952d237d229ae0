"""Rolls a branch on the Hub back to an earlier release, by a new commit with the content of the earlier one.

The Hub allows no forced move of a branch, and this keeps the history. Large files are copied by their sha256 and not sent
again.
"""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from runner.credentials import token
from runner.errors import StageError, StockpotError
from runner.hub.receipts import Journal, Receipt, known_commits, target_lock
from runner.hub.repository import SHOWN, Branch, files_at, full_name, refuse_if_changed
from runner.hub.retries import DEFAULT_RETRIES, Retries, describe, quiet_client, with_retries
from runner.hub.target import Target

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def roll_back(
    target: Target,
    *,
    to: str | None,  # a tag or a commit; None for the release before the current one, by the receipts
    receipts: Path,
    overwrite: bool = False,
    retries: Retries = DEFAULT_RETRIES,
) -> Receipt:
    """Restores the content of an earlier commit on the branch; returns the receipt that it writes.

    StageError if there is no such commit, or if someone else changed the branch and `overwrite` is false.
    """
    secret = token()
    if secret is None:
        raise StageError(f"to change {target}, set HF_TOKEN or log in with `hf auth login`")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=target.endpoint, token=secret)
    with target_lock(receipts, target), quiet_client():
        journal = Journal.read(receipts, target)
        earlier = journal.before_last() if to is None else None
        if to is None and earlier is None:
            raise StageError(f"{target}: the receipts have no earlier release; name a tag or a commit with --to")
        try:
            origin = earlier.commit if earlier else with_retries(lambda: _resolved(api, target, str(to)), retries)
            commit, url = with_retries(lambda: _restored(api, target, origin, receipts, overwrite), retries)
        except StockpotError:
            raise
        except Exception as error:  # the client may raise anything
            raise StageError(f"rolling back {target} failed ({describe(error)}); the branch is unchanged") from None
        known = next((receipt for receipt in journal.receipts if receipt.commit == origin), None)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        digest, files = (known.digest, known.files) if known else ("", ())
        receipt = Receipt(digest, commit, url, now, files=files, restores=origin)
        journal.with_receipt(receipt).write(receipts)
    return receipt


def _resolved(api: "HfApi", target: Target, to: str) -> str:
    """The commit of a tag or of an abbreviated commit id."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(api.repo_info(full_name(api, target.repo), revision=to).sha)
    except RevisionNotFoundError:
        raise StageError(f"{target}: expected an existing tag or commit, got {to!r}") from None
    except RepositoryNotFoundError:
        raise StageError(f"{target}: does not exist, or the token has no access") from None


def _restored(api: "HfApi", target: Target, origin: str, receipts: Path, overwrite: bool) -> tuple[str, str]:
    """The commit of the branch with the content of `origin`, and its address; made unless it exists."""
    repo = full_name(api, target.repo)
    heads = {branch.name: branch.target_commit for branch in api.list_repo_refs(repo).branches}
    if target.branch not in heads:
        raise StageError(f"{target}: the branch does not exist")
    branch = Branch(repo, heads[target.branch], files_at(api, repo, heads[target.branch]))
    files = files_at(api, repo, origin)
    if files == branch.files:
        return branch.commit, f"{target.endpoint}/{repo}/commit/{branch.commit}"
    if not overwrite:
        last = Journal.read(receipts, target).last
        refuse_if_changed(api, branch, target, known=known_commits(receipts), last=last.commit if last else None)
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    operations: list[CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationCopy(name, name, src_revision=origin) for name, file in files.items() if branch.files.get(name) != file
    ]
    operations += [CommitOperationDelete(name) for name in sorted(branch.files.keys() - files.keys())]
    made = api.create_commit(
        repo, operations, commit_message=f"Roll back to {origin[:SHOWN]}", revision=target.branch, parent_commit=branch.commit
    )
    return made.oid, str(made.commit_url)

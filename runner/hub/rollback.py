"""Moving a branch on the Hub back to an earlier release: a new commit whose content is that of the earlier one.

The Hub moves no branch by force, and nothing is lost this way. Large files are named by their sha256 and not sent; the small
ones go through here.
"""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from runner.credentials import token
from runner.errors import StageError, StockpotError
from runner.hub.receipts import Journal, Receipt, held, known_commits
from runner.hub.repository import SHOWN, Branch, files_at, full_name, refuse_if_changed
from runner.hub.retries import PATIENT, Retries, attempted, quiet, told
from runner.hub.target import Target

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def roll_back(
    target: Target,
    *,
    to: str | None,  # a tag or a commit; None for the release before the present one, as the receipts know it
    receipts: Path,
    overwrite: bool = False,
    retries: Retries = PATIENT,
) -> Receipt:
    """Brings the content of an earlier commit back to the branch, and returns the receipt that it wrote.

    StageError if there is no such commit, or if somebody else has changed the branch and `overwrite` does not allow to go over
    that.
    """
    secret = token()
    if secret is None:
        raise StageError(f"to change {target}, set HF_TOKEN or log in with `hf auth login`")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=target.endpoint, token=secret)
    with held(receipts, target), quiet():
        journal = Journal.read(receipts, target)
        earlier = journal.before_last() if to is None else None
        if to is None and earlier is None:
            raise StageError(f"{target}: no release before the present one is known here; name a tag or a commit with --to")
        try:
            wanted = earlier.commit if earlier else attempted(lambda: _resolved(api, target, str(to)), retries)
            commit, url = attempted(lambda: _brought_back(api, target, wanted, receipts, overwrite), retries)
        except StockpotError:
            raise
        except Exception as error:  # whatever the client and the layers below it raise
            raise StageError(f"rolling back {target} did not succeed ({told(error)}); the branch is as it was") from None
        known = next((one for one in journal.receipts if one.commit == wanted), None)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        digest, files = (known.digest, known.files) if known else ("", ())
        receipt = Receipt(digest, commit, url, now, files=files, restores=wanted)
        journal.with_receipt(receipt).write(receipts)
    return receipt


def _resolved(api: "HfApi", target: Target, to: str) -> str:
    """The commit that a tag or the beginning of a commit stands for."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(api.repo_info(full_name(api, target.repo), revision=to).sha)
    except RevisionNotFoundError:
        raise StageError(f"{target}: expected a tag or a commit that is there, found no {to!r}") from None
    except RepositoryNotFoundError:
        raise StageError(f"{target}: is not there, or not shown to the token") from None


def _brought_back(api: "HfApi", target: Target, wanted: str, receipts: Path, overwrite: bool) -> tuple[str, str]:
    """The commit of the branch that holds what `wanted` holds, and its address; made unless it is there."""
    repo = full_name(api, target.repo)
    heads = {branch.name: branch.target_commit for branch in api.list_repo_refs(repo).branches}
    if target.branch not in heads:
        raise StageError(f"{target}: there is no such branch")
    branch = Branch(repo, heads[target.branch], files_at(api, repo, heads[target.branch]))
    there = files_at(api, repo, wanted)
    if there == branch.files:
        return branch.commit, f"{target.endpoint}/{repo}/commit/{branch.commit}"
    if not overwrite:
        last = Journal.read(receipts, target).last
        refuse_if_changed(api, branch, target, known=known_commits(receipts), last=last.commit if last else None)
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    operations: list[CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationCopy(name, name, src_revision=wanted) for name, file in there.items() if branch.files.get(name) != file
    ]
    operations += [CommitOperationDelete(name) for name in sorted(branch.files.keys() - there.keys())]
    made = api.create_commit(
        repo,
        operations,
        commit_message=f"Roll back to {wanted[:SHOWN]}",
        revision=target.branch,
        parent_commit=branch.commit,
    )
    return made.oid, str(made.commit_url)

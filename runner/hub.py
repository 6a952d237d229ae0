"""Pushing a release to the Hugging Face Hub, and the receipts that say what was pushed where.

Whether something was pushed is decided by a receipt on disk alone: planning never touches the network. `huggingface_hub`
is imported only to push. A token is read, sent, and never written anywhere, messages included.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import StageError
from runner.files import write_whole

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PUBLIC_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Target:
    """A branch of a repository on a Hub."""

    repo: str  # "owner/name", or "name" of whoever the token belongs to
    branch: str = "main"
    endpoint: str = PUBLIC_HUB

    def __str__(self) -> str:
        place = "the Hub" if self.endpoint == PUBLIC_HUB else self.endpoint
        return f"{self.repo} on {place}" + ("" if self.branch == "main" else f", branch {self.branch}")


def endpoint() -> str:
    """The Hub that HF_ENDPOINT names, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")


def token() -> str | None:
    """The user's token, found where `huggingface_hub` looks for it: HF_TOKEN, else the file that `hf auth login` writes."""
    if found := os.environ.get("HF_TOKEN", "").strip():
        return found
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    path = Path(os.path.expandvars(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def receipt_path(receipts: Path, target: Target, digest: str) -> Path:
    """Where the receipt for a release of this digest is kept: one per endpoint, repository, branch and digest."""
    name = hashlib.sha256(json.dumps([target.endpoint, target.repo, target.branch, digest]).encode()).hexdigest()
    return receipts / f"{name}.json"


def read_receipt(receipts: Path, target: Target, digest: str) -> Mapping[str, Any] | None:
    """What is known of the push of a release, None if it was never pushed."""
    try:
        receipt: dict[str, Any] = json.loads(receipt_path(receipts, target, digest).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return receipt


def push(folder: Path, target: Target, *, files: Mapping[str, Path], private: bool, digest: str, receipts: Path) -> str:
    """Puts `files` (path in the repository -> file) there in one commit and writes the receipt; returns the commit's address.

    The repository is created if it is not there. Raises StageError, and nothing is visible of the release then.
    """
    secret = token()
    if secret is None:
        raise StageError(how_to_push(target))
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(endpoint=target.endpoint, token=secret)
    try:
        repo = _with_owner(target.repo, api)
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(files.items())],
            commit_message=f"Release {digest[:12]}",
            revision=target.branch,
        )
    except Exception as error:  # whatever the client and the layers below it raise, the release itself is finished
        reason = _causes(error).replace(secret, "***")
        raise StageError(
            f"pushing {folder} to {target} did not succeed ({reason}); the release is finished, and the next run pushes it"
        ) from None
    receipt = {
        "endpoint": target.endpoint,
        "repo": repo,
        "branch": target.branch,
        "digest": digest,
        "commit": commit.oid,
        "url": str(commit.commit_url),
    }
    write_whole(receipt_path(receipts, target, digest), json.dumps(receipt, indent=2))
    return str(commit.commit_url)


def how_to_push(target: Target) -> str:
    """What the user does to get a finished release pushed."""
    return f"to push it to {target}, set HF_TOKEN or log in with `hf auth login`, then run the recipe again"


def _causes(error: BaseException) -> str:
    """An error and what it came from, on one line."""
    sentence = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{sentence} Cause: {_causes(error.__cause__)}" if error.__cause__ else sentence


def _with_owner(repo: str, api: "HfApi") -> str:
    return repo if "/" in repo else f"{api.whoami()['name']}/{repo}"

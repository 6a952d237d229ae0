"""The Hugging Face Hub as seen from here: which one, whose token, and the place on it that a release goes to.

Nothing here talks to it; that is `runner.push`, `runner.rollback` and `runner.hub.download`. A token is read, sent, and never
written anywhere, messages included.
"""

import os
from dataclasses import dataclass
from pathlib import Path

PUBLIC_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Target:
    """A branch of a repository on a Hub, or pull requests to it."""

    repo: str  # "owner/name", or "name" of whoever the token belongs to
    branch: str = "main"
    endpoint: str = PUBLIC_HUB
    pull_request: bool = False

    def __str__(self) -> str:
        place = "the Hub" if self.endpoint == PUBLIC_HUB else self.endpoint
        branch = "" if self.branch == "main" else f", branch {self.branch}"
        return f"{self.repo} on {place}{branch}{', as a pull request' if self.pull_request else ''}"


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


def how_to_push(target: Target) -> str:
    """What the user does to get a finished release pushed."""
    return f"to push it to {target}, set HF_TOKEN or log in with `hf auth login`, then run the recipe again"

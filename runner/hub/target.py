"""The target of a push: a branch of a repository on a Hub."""

import re
from dataclasses import dataclass

from runner.credentials import PUBLIC_HUB

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def repository_name(text: str) -> str:
    """`text`, if the Hub takes it as the name of a repository, with or without an owner; else ValueError with its rules."""
    parts = text.split("/")
    fits = len(parts) <= 2 and all(_NAME.fullmatch(part) and len(part) <= 96 for part in parts)
    if not fits or "--" in text or ".." in text or text.endswith(".git"):
        raise ValueError(
            'expected "owner/name" or "name" as the Hub takes it: letters from a to z, digits, and - _ . between them, '
            "not two of "
            f"- or . together, at most 96 of them, not ending in .git; got {text!r}"
        )
    return text


@dataclass(frozen=True)
class Target:
    """A branch of a repository on a Hub, or a pull request to it."""

    repo: str  # "owner/name", or "name" with the owner of the token
    branch: str = "main"
    endpoint: str = PUBLIC_HUB
    pull_request: bool = False

    def __str__(self) -> str:
        place = "the Hub" if self.endpoint == PUBLIC_HUB else self.endpoint
        branch = "" if self.branch == "main" else f", branch {self.branch}"
        return f"{self.repo} on {place}{branch}{', as a pull request' if self.pull_request else ''}"


def how_to_push(target: Target) -> str:
    """Tells the user how to push a finished release."""
    return f"to push it to {target}, set HF_TOKEN or log in with `hf auth login`, then run the recipe again"

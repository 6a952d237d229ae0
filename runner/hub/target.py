"""The target of a push: a branch of a repository on a Hub."""

from dataclasses import dataclass

from runner.credentials import PUBLIC_HUB


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

"""Where on a Hub something goes."""

from dataclasses import dataclass

from runner.credentials import PUBLIC_HUB


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


def how_to_push(target: Target) -> str:
    """What the user does to get a finished release pushed."""
    return f"to push it to {target}, set HF_TOKEN or log in with `hf auth login`, then run the recipe again"

"""The other machines of a training as execution sees them; `runner.multi_node.coordinator` implements this."""

from collections.abc import Mapping
from typing import Any, Protocol

from runner.execution.node_layout import Layout


class Peers(Protocol):
    """The other machines, on the machine of rank 0.

    MachineLostError: a machine is gone. PeerFailedError: its processes failed. RecipeError: it disagrees about the training.
    """

    @property
    def layout(self) -> Layout:
        """The machines of the run."""

    @property
    def shares_cache(self) -> bool:
        """Whether all machines see the cache of this one."""

    @property
    def is_broken(self) -> bool:
        """Whether a machine was given up and is still missing."""

    def assemble(self) -> None:
        """Waits until all machines are connected; MachineLostError if one that was here does not come back."""

    def begin(self, stage: str, announcement: Mapping[str, Any]) -> None:
        """Announces a training and returns when all machines are ready and start it."""

    def check(self) -> None:
        """Raises what happened on another machine; passes on its request to stop."""

    def causes(self) -> list[str]:
        """What the other machines report after a training failed here; raises what ends it for good."""

    def notify(self, text: str) -> None:
        """Sends a message for the users of the other machines."""

    def give_up(self) -> None:
        """Continues without the missing machines; any that are back at the next training take part."""

"""Who is told of alerts and faults: the addresses in a recipe and in the environment, and notices to them through apprise.

What is watched and when an alert is raised is `llm.training.alerts.monitor`; what follows a pause or a fault is `stage_run`. An address may
hold a password or be a secret as a whole, so none is ever shown or kept.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence

from runner.credentials import NOTIFY, redact


class Notices:
    """Sends sentences to all addresses; one that cannot be sent is a warning, told once for each address."""

    def __init__(self, recipe: str, addresses: Sequence[str], *, warn: Callable[[str], None]) -> None:
        self._recipe, self._warn = recipe, warn
        self._addresses = list(dict.fromkeys([*addresses, *os.environ.get(NOTIFY, "").split()]))
        self._failed: set[str] = set()

    def send(self, text: str) -> None:
        """Sends `text`; without addresses nothing happens, and apprise is not even imported."""
        for number, address in enumerate(self._addresses, start=1):
            if not _sent(address, title=f"Stockpot: {self._recipe}", text=redact(text)) and address not in self._failed:
                self._failed.add(address)
                of = f"{number} of {len(self._addresses)}"
                self._warn(f"warning: a notice could not be sent to address {of} ({address.partition(':')[0]}://...)")


def _sent(address: str, *, title: str, text: str) -> bool:
    import apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # it writes addresses
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about modules that its services import
            sender = apprise.Apprise()
            return sender.add(address) and bool(sender.notify(title=title, body=text))
    except Exception:  # of any service's client: a notice is no reason to end a training
        return False

"""Notifications about alerts and faults, sent through apprise to the addresses in the recipe and the environment.

`llm.training.alerts` decides when an alert is raised. An address may hold a password or be a secret itself, so addresses are
never shown or stored.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence

from runner.credentials import NOTIFY, redact


class Notifier:
    """Sends messages to all addresses; a failure is one warning per address."""

    def __init__(self, recipe: str, addresses: Sequence[str], *, warn: Callable[[str], None]) -> None:
        self._recipe, self._warn = recipe, warn
        self._addresses = list(dict.fromkeys([*addresses, *os.environ.get(NOTIFY, "").split()]))
        self._failed: set[str] = set()

    def send(self, text: str) -> None:
        """Sends `text`; without addresses apprise is not imported."""
        for number, address in enumerate(self._addresses, start=1):
            if not _sent(address, title=f"Stockpot: {self._recipe}", text=redact(text)) and address not in self._failed:
                self._failed.add(address)
                of = f"{number} of {len(self._addresses)}"
                self._warn(f"warning: a notice could not be sent to address {of} ({address.partition(':')[0]}://...)")


def _sent(address: str, *, title: str, text: str) -> bool:
    import apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # it logs addresses
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of modules that its services import
            sender = apprise.Apprise()
            return sender.add(address) and bool(sender.notify(title=title, body=text))
    except Exception:  # a service's client may raise anything; a failed notice never ends a training
        return False

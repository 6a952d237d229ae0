"""Where the records of a cache came from, and which of them count.

    origins/<key>.json    {"seal": "...", "from": "s3://bucket/cache"}; without one, a record was made here

A note is about the record with its seal alone, so one that was made here since is not touched by an old note. A record of a
remote counts if the user named that remote: for this process, or once and for all in `remotes.toml` of the user's
configuration. It never counts because a recipe names the remote. Removing a remote from that file makes everything that came
from it count no more.
"""

import contextlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import tomli
import tomli_w

from runner.cache.record import Record
from runner.files import read_bounded, write_whole

FOLDER = "origins"
UNKNOWN = "an unknown place"
LARGEST = 1 << 16  # bytes of a note
FILE = "remotes.toml"
SEAL = re.compile("[0-9a-f]{64}")


@dataclass
class Origins:
    """The notes of one cache."""

    cache: Path
    named: set[str] = field(default_factory=set)  # remotes that the user named for this process

    def of(self, record: Record) -> str | None:
        """Where a record came from; None if it was made here."""
        path = self._path(record.key)
        if not os.path.lexists(path):  # no exception, since almost all are made here
            return None
        try:
            note = json.loads(read_bounded(Path(path), LARGEST))
            seal, origin = note["seal"], note["from"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return UNKNOWN
        if not (isinstance(seal, str) and SEAL.fullmatch(seal) and isinstance(origin, str)):
            return UNKNOWN
        return origin if seal == record.seal else None

    def noted(self) -> set[str]:
        """The keys with a note."""
        return {path.stem for path in (self.cache / FOLDER).glob("*.json")}

    def counts(self, origin: str | None) -> bool:
        """Whether results from a place are used: those made here, and those of remotes that the user named."""
        if origin is None or origin in self.named:
            return True
        return origin in trusted_remotes()

    def note(self, record: Record, origin: str | None) -> None:
        """Notes where a record came from, before it is written."""
        path = Path(self._path(record.key))
        if origin is not None:
            write_whole(path, json.dumps({"seal": record.seal, "from": origin}))
        elif path.exists():
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> str:
        return f"{self.cache}/{FOLDER}/{key}.json"


def trusted_file() -> Path:
    """The file of the user's configuration that lists the remotes whose results count."""
    from platformdirs import user_config_path

    return user_config_path("stockpot") / FILE


def trusted_remotes() -> set[str]:
    """The remotes that the user named once and for all; none if the file is missing or damaged."""
    try:
        listed = tomli.loads(read_bounded(trusted_file(), LARGEST).decode()).get("trusted", [])
    except (OSError, ValueError, RecursionError):
        return set()
    return {address for address in listed if isinstance(address, str)} if isinstance(listed, list) else set()


def trust(address: str) -> Path | None:
    """Adds a remote to the file; returns the file if the remote was not in it, and None if it was or cannot be written."""
    known = trusted_remotes()
    if address in known:
        return None
    with contextlib.suppress(OSError):
        write_whole(trusted_file(), tomli_w.dumps({"trusted": sorted(known | {address})}))
        return trusted_file()
    return None

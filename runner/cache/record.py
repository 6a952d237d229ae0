"""The record of a finished stage: what it says, and the seal by which a changed byte of it is noticed.

A record is JSON whose first entry is the sha256 of all that follows it in the file. Gates are judged from records and keys of
later stages rest on them, so one that does not fit its seal is treated as if it were not there.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.artifacts import METRICS

_HEAD, _TAIL = b'{\n  "seal": "', b'",\n'
_SEAL = slice(len(_HEAD), len(_HEAD) + 64)
_BODY = _SEAL.stop + len(_TAIL)


class DamagedError(ValueError):
    """A record that does not fit its seal."""

    def __init__(self, *, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Record:
    """What is known of a finished stage: enough to plan without its artifact."""

    data: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The kind of stage."""
        return str(self.data["kind"])

    @property
    def key(self) -> str:
        """The key it was computed under."""
        return str(self.data["key"])

    @property
    def name(self) -> str:
        """What the artifact's folder is called."""
        return f"{self.kind}-{self.key}"

    @property
    def digest(self) -> str:
        """sha256 over the artifact's content."""
        return str(self.data["digest"])

    @property
    def files(self) -> dict[str, str]:
        """sha256 of each content file."""
        return dict(self.data["files"])

    @property
    def attachments(self) -> dict[str, str]:
        """sha256 of each file that goes with the content and is not part of its digest."""
        return dict(self.data["attachments"])

    @property
    def used(self) -> dict[str, str]:
        """sha256 of each file that anything reads: all but what the worker reported on its way."""
        return {name: digest for name, digest in (self.files | self.attachments).items() if name != METRICS}

    def summary(self) -> dict[str, str]:
        """What the record of a later stage says of this one as its input."""
        return {"kind": self.kind, "key": self.key, "digest": self.digest}

    @cached_property
    def sealed(self) -> bytes:
        """The file's bytes."""
        body = json.dumps(self.data, indent=2, ensure_ascii=False).removeprefix("{\n").encode() + b"\n"
        return _HEAD + hashlib.sha256(body).hexdigest().encode() + _TAIL + body

    @property
    def seal(self) -> str:
        """sha256 of what the file holds after this very entry."""
        return self.sealed[_SEAL].decode()

    @classmethod
    def unsealed(cls, sealed: bytes) -> "Record":
        """The record that `sealed` holds; DamagedError if a byte of it is not what was written."""
        body = sealed[_BODY:]
        found = hashlib.sha256(body).hexdigest()
        if sealed[:_BODY] != _HEAD + found.encode() + _TAIL:
            told = f"seal {sealed[_SEAL].decode(errors='replace')}" if sealed.startswith(_HEAD) else "a seal"
            raise DamagedError(expected=told, found=f"seal {found}")
        try:
            return cls(json.loads(b"{" + body))
        except ValueError as error:  # sealed by somebody else's hand
            raise DamagedError(expected="JSON", found=str(error)) from error


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of an artifact: over the names and digests of its content files."""
    text = json.dumps(dict(files), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

"""The record of a finished stage, and the seal that detects a changed byte of it.

A record is JSON whose first entry is the sha256 of the rest of the file. Gates are judged from records, and keys of later
stages depend on them, so a record that does not match its seal, or does not have the form of one, counts as missing. A seal
proves nothing about who made it: `runner.cache.origins` says where a record came from.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.artifacts import METRICS
from runner.cache.record_form import form_fault, whole_number
from runner.files import read_bounded

_HEAD, _TAIL = b'{\n  "seal": "', b'",\n'
_SEAL = slice(len(_HEAD), len(_HEAD) + 64)
_BODY = _SEAL.stop + len(_TAIL)
LARGEST = 32 * 2**20  # bytes of a record; those of long trainings, with their curves, have some 100 kB


class DamagedRecordError(ValueError):
    """A record that does not match its seal, or does not have the form of one."""

    def __init__(self, *, expected: str, got: str) -> None:
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got = expected, got


@dataclass(frozen=True)
class Record:
    """Facts of a finished stage, enough to plan without its artifact."""

    data: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The kind of stage."""
        return str(self.data["kind"])

    @property
    def key(self) -> str:
        """The stage's key."""
        return str(self.data["key"])

    @property
    def name(self) -> str:
        """The name of the artifact's folder."""
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
        """sha256 of each file that is not part of the content digest."""
        return dict(self.data["attachments"])

    @property
    def used(self) -> dict[str, str]:
        """sha256 of each file that other stages may read: all but the metrics."""
        return {name: digest for name, digest in (self.files | self.attachments).items() if name != METRICS}

    @property
    def made_as(self) -> str:
        """The recipe and the stage that it was made for: `quickstart's base`."""
        return f"{self.data.get('recipe')}'s {self.data.get('stage')}"

    def summary(self) -> dict[str, str]:
        """How the record of a later stage names this one as its input."""
        return {"kind": self.kind, "key": self.key, "digest": self.digest}

    @cached_property
    def sealed(self) -> bytes:
        """The file's bytes."""
        body = json.dumps(self.data, indent=2, ensure_ascii=False).removeprefix("{\n").encode() + b"\n"
        return _HEAD + hashlib.sha256(body).hexdigest().encode() + _TAIL + body

    @property
    def seal(self) -> str:
        """sha256 of the rest of the file."""
        return self.sealed[_SEAL].decode()

    @classmethod
    def unsealed(cls, sealed: bytes) -> "Record":
        """The record in the bytes `sealed`; DamagedRecordError if any byte changed, or it does not have the form of one."""
        if len(sealed) > LARGEST:
            raise DamagedRecordError(expected=f"at most {LARGEST:,} bytes", got=f"{len(sealed):,} or more")
        body = sealed[_BODY:]
        actual = hashlib.sha256(body).hexdigest()
        if sealed[:_BODY] != _HEAD + actual.encode() + _TAIL:
            expected = f"seal {sealed[_SEAL].decode(errors='replace')}" if sealed.startswith(_HEAD) else "a seal"
            raise DamagedRecordError(expected=expected, got=f"seal {actual}")
        try:
            data = json.loads(b"{" + body, parse_int=whole_number)
        except (ValueError, RecursionError) as error:  # another program sealed it
            raise DamagedRecordError(expected="JSON", got=str(error)) from error
        if fault := form_fault(data, body):
            raise DamagedRecordError(expected="the form of a record", got=fault)
        if (digest := digest_of(data["files"])) != data["digest"]:
            raise DamagedRecordError(expected=f"the digest of its files, {digest[:12]}", got=data["digest"][:12])
        return cls(data)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record in a file, of which no more is read than a record may have."""
        return cls.unsealed(read_bounded(path, LARGEST))


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of an artifact, over the names and digests of its content files."""
    text = json.dumps(dict(files), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

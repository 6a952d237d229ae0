"""metrics.jsonl: written by a worker, followed by whoever shows or tracks it."""

import contextlib
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Follower:
    """Reads what is appended to a metrics file, from its present end."""

    def __init__(self, path: Path, *, offset: int | None = None) -> None:
        self.path = path
        self.offset = (path.stat().st_size if path.exists() else 0) if offset is None else offset  # bytes read

    def moved_to(self, path: Path) -> None:
        """The file is the same under another name."""
        self.path = path

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """The complete lines that were added since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
                    yield json.loads(line)


class Report:
    """Appends one JSON line per call; only the first process of a training has one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # after a line that a kill cut short

    def __call__(self, **values: Any) -> None:
        """Append `values`, with the time."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"time": now, **values}, ensure_ascii=False) + "\n")

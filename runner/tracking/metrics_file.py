"""metrics.jsonl: one JSON object a line, appended by the first worker of a stage and read while the stage runs."""

import contextlib
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsReader:
    """Reads what is appended to a metrics file, from byte `offset`, by default its present end."""

    def __init__(self, path: Path, *, offset: int | None = None) -> None:
        self.path = path
        self.offset = (path.stat().st_size if path.exists() else 0) if offset is None else offset  # bytes read

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
                with contextlib.suppress(json.JSONDecodeError):  # a kill cut the line short
                    yield json.loads(line)


class MetricsWriter:
    """Appends one JSON line per call. Only the first process of a stage has one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # a kill cut the last line short

    def __call__(self, **values: Any) -> None:
        """Appends `values` and the time."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"time": now, **values}, ensure_ascii=False) + "\n")

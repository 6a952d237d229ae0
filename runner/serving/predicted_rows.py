"""Rows with predictions, as they are made and as they are kept: a part file that grows, and the whole at the end.

The part file is JSON Lines; its first line says what makes it (model, task, data), so a run that was stopped goes on where it
was, and one of another model begins again.
"""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from runner.errors import RecipeError
from runner.files import write_whole

ENDINGS = (".csv", ".jsonl", ".parquet")
Row = dict[str, Any]


class PredictedRows:
    """The output of one prediction at `path`, whose ending is its format."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """`about` is what decides the rows: with the same, an earlier part is kept. RecipeError for another ending."""
        if path.suffix.lower() not in ENDINGS:
            raise RecipeError(f"--out {path}: expected a file named *{', *'.join(ENDINGS)}, got {path.name!r}")
        self.path, self.part = path, path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps(about, sort_keys=True)
        self.done = self._kept(head)  # rows
        self._file: IO[str] = self.part.open("a", encoding="utf-8")
        if not self._file.tell():
            self._file.write(head + "\n")

    def _kept(self, head: str) -> int:
        """How many rows the part file has; it is removed if they are of something else, and cut after its last whole line."""
        if not self.part.exists():
            return 0
        content = self.part.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole.partition(b"\n")[0].decode(errors="replace") != head:
            self.part.unlink()
            return 0
        if len(whole) < len(content):
            os.truncate(self.part, len(whole))
        return whole.count(b"\n") - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the part file where it has rows."""
        self._file.close()
        if self.part.exists() and not self.done:
            self.part.unlink()

    def add(self, rows: Sequence[Row]) -> None:
        """Keep these rows, after those before them."""
        self.done += len(rows)
        self._file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        self._file.flush()

    def finish(self) -> None:
        """Write the whole file, and remove the part."""
        self._file.flush()
        match self.path.suffix.lower():
            case ".jsonl":
                write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows()))
            case ".csv":
                self._write_csv()
            case ".parquet":
                self._write_parquet()
        self.part.unlink()

    def _rows(self) -> Iterator[Row]:
        with self.part.open(encoding="utf-8") as lines:
            next(lines)
            for line in lines:
                yield json.loads(line)

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows() for name in row))

    def _write_csv(self) -> None:
        target = self.path.with_name(self.path.name + ".new")
        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns())
            writer.writeheader()
            for row in self._rows():
                writer.writerow({name: _cell(value) for name, value in row.items()})
        target.replace(self.path)

    def _write_parquet(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        target, names = self.path.with_name(self.path.name + ".new"), self._columns()
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for row in self._rows():
            for name in names:
                columns[name].append(row.get(name))
        pq.write_table(pa.table({name: _array(pa, values) for name, values in columns.items()}), target)
        target.replace(self.path)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _array(arrow: Any, values: Sequence[Any]) -> Any:
    try:
        return arrow.array(values)
    except arrow.ArrowException:  # a field whose values are of several types
        return arrow.array(
            [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
        )


def plain_row(fields: Mapping[str, Any]) -> Row:
    """The fields of a row as JSON holds them: no number (NaN) is null, and what has no form there is text."""
    return {
        str(name): None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }

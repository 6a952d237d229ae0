"""A process that reads a sheet of a workbook, with bounded memory.

A workbook is read whole, and one of a few kilobytes may name a cell in the last row and column of a sheet of 17 billion. A
process can be ended. It writes a row a line as JSON, and then `null`; in place of all that, a text says what is wrong.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.errors import InputError

MOST_MEMORY = 2 << 30  # bytes beyond what the process has after its imports: a million rows of ten columns take 1.5 GiB


def read_apart(path: Path, sheet: str | None, *, most_memory: int = MOST_MEMORY) -> Iterator[list[Any]]:
    """The rows of a sheet, by default of the first one, as lists of JSON's values; dates are as in ISO 8601."""
    command = [sys.executable, "-P", "-m", __name__, str(path), json.dumps(sheet), str(most_memory)]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                row = json.loads(line) if line.endswith(b"\n") else None
                if isinstance(row, str):
                    raise InputError(f"{path}: {row}")
                if row is None:
                    if line:
                        return
                    break
                yield row
            raise InputError(
                f"{path}: expected a workbook that is read in {most_memory / 2**30:.3g} GiB, got one that takes more, or that "
                "ends its reader; save the sheet as .csv"
            )
        finally:
            process.kill()


def main() -> None:
    """Writes the rows."""
    import python_calamine

    path, sheet, most_memory = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + most_memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        with python_calamine.CalamineWorkbook.from_path(path) as book:
            names = book.sheet_names
            if sheet is not None and sheet not in names:
                _write(f"expected a sheet {sheet!r}, got only {', '.join(map(repr, names))}")
                return
            rows = book.get_sheet_by_name(sheet or names[0]).to_python(skip_empty_area=False)
    except (python_calamine.CalamineError, OSError) as error:
        _write(f"is not a readable workbook ({error})")
        return
    for row in rows:
        _write([_cell(value) for value in row])
    _write(None)


def _cell(value: Any) -> Any:
    """A cell as text would have it: whole numbers without a point, dates as in ISO 8601."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float) else str(value)


def _write(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()

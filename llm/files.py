"""Files that are complete under their final name: written beside it and renamed. Their content is others' business."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8."""
    with _growing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, keys sorted, so that equal values are equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` to `path` as safetensors; what the disk refuses is an OSError, as for any other file."""
    with _growing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # safetensors keeps it only in its message
            if number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it readable to its owner alone


@contextmanager
def _growing(path: Path) -> Iterator[Path]:
    """Where to write; renamed to `path` in the end, or removed, so that a full disk is no fuller."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

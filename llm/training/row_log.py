"""Which rows each step learned from, as the loop got them, so that two trainings can be compared.

One line of JSON per step and process: the process's id, the step, and of each row its place in the step and a digest of its
content. A line is handed to the system before the next step starts, so a kill loses none of a finished step.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from llm.data.batch import Batch

HEX = 16  # digits of a digest, 64 bits: the chance that two of a million rows have the same is 3e-8


class RowLog:
    """Appends the rows of finished steps to a file; called with a step and its batches."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write("\n")  # ends a line that a kill cut short

    def __call__(self, step: int, parts: Iterable[Batch]) -> None:
        """Write the rows of step `step`, counted from 0."""
        rows = {str(index): digest for part in parts for index, digest in zip(part.rows.tolist(), _digests(part), strict=True)}
        self._write(json.dumps({"process": os.getpid(), "step": step, "rows": rows}) + "\n")

    def _write(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)


def _digests(batch: Batch) -> Iterable[str]:
    """Of each row: over its tokens, its targets and where its documents begin."""
    for row in zip(batch.tokens.cpu(), batch.targets.cpu(), batch.documents.cpu(), strict=True):
        digest = hashlib.sha256()
        for tensor in row:
            digest.update(tensor.numpy().tobytes())
        yield digest.hexdigest()[:HEX]

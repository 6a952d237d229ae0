"""The retry policy of a training: after a machine fault retry, fall back to one process, or give up. Faults are kept on disk.

A machine fault is a worker that died, a group that did not form, memory that ran out, or a step that did not end; never an
error of data or recipe. `stage_run` launches the processes.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from runner.files import write_whole
from runner.stage import Parallel

FAULTS = "faults.json"  # in scratch, so that later runs know them


class RetryPolicy:
    """The number of processes of the next attempt, and the faults so far."""

    def __init__(self, scratch: Path, parallel: Parallel, *, processes: int) -> None:
        self._path, self._parallel = scratch / FAULTS, parallel
        self.processes = processes
        self._left = parallel.retries
        self._furthest = 0  # step
        self.faults: list[dict[str, Any]] = []
        if self._path.exists():
            self.faults = json.loads(self._path.read_text(encoding="utf-8"))

    def after_fault(self, cause: str, *, step: int) -> str | None:
        """Records a fault at `step` and sets `processes`; returns what happens next as the end of a sentence, None to give
        up."""
        used = self.processes
        if step > self._furthest:
            self._furthest, self._left = step, self._parallel.retries
        then = self._next()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.faults.append({"time": now, "step": step, "processes": used, "cause": cause, "then": then or "gave up"})
        write_whole(self._path, json.dumps(self.faults, ensure_ascii=False))
        return then

    def _next(self) -> str | None:
        if self._left > 0:
            self._left -= 1
            return f"retries from the last checkpoint ({self._left} more {'retry' if self._left == 1 else 'retries'} left)"
        if self.processes > 1 and self._parallel.fallback == "single":
            self.processes, self._left = 1, self._parallel.retries
            return "continues with one process and the same batch from the last checkpoint"
        return None

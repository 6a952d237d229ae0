"""What follows a fault of a training: the same again, one process instead of many, or the end. Every fault is kept on disk.

Nothing is launched here: that is `stage_run`. A fault here is one of machines (a worker died, a group did not form, memory ran
out, a step did not end), never of data or recipe.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from runner.files import write_whole
from runner.stage import Parallel

FAULTS = "faults.json"  # in scratch, so that they outlive the run


class Recovery:
    """In how many processes a training is to begin next, and the faults so far."""

    def __init__(self, scratch: Path, parallel: Parallel, *, processes: int) -> None:
        self._path, self._parallel = scratch / FAULTS, parallel
        self.processes = processes
        self._left = parallel.retries
        self._furthest = 0  # step
        self.faults: list[dict[str, Any]] = []
        if self._path.exists():
            self.faults = json.loads(self._path.read_text(encoding="utf-8"))

    def after(self, cause: str, *, step: int) -> str | None:
        """What is done about a fault at `step`, as the end of a sentence, after `processes` says how; None: nothing."""
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
            left = f"{self._left} more {'retry' if self._left == 1 else 'retries'} left"
            return f"begins again from the last checkpoint ({left})"
        if self.processes > 1 and self._parallel.fallback == "single":
            self.processes, self._left = 1, self._parallel.retries
            return "goes on with one process and the same batch from the last checkpoint"
        return None

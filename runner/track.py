"""The tracker: a process of its own that follows metrics.jsonl files and mirrors them to aim. The only file that imports aim.

One writer per cache, since concurrent writers damage an aim repository. A tracker that fails is a warning, never a failed run.
"""

import fcntl
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.progress import Follower

CLOSE_SECONDS = 20.0  # for what is left to mirror when a run ends
POLL_SECONDS = 0.5
NOT_TRACKED = frozenset({"time", "step", "steps", "note", "unit", "done", "total"})


class Tracker:
    """The run's end of the tracker process, which starts with the first stage that is tracked."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._process: subprocess.Popen[str] | None = None

    def follow(self, metrics: Follower, finished: Path, facts: Mapping[str, Any]) -> None:
        """Mirrors a metrics file from where `metrics` stands; it will move to `finished` when its stage is done."""
        if self._process is None:
            with self._log().open("a") as log:
                command = [sys.executable, "-m", "runner.track", str(self._cache)]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True
                )
        self._tell({"metrics": str(metrics.path), "offset": metrics.offset, "finished": str(finished), "facts": facts})

    def close(self) -> str | None:
        """Waits until everything is mirrored; a sentence if that did not succeed."""
        if self._process is None:
            return None
        try:
            self._process.communicate(timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode == 0:
            return None
        return f"warning: not everything reached aim; the curves are complete in metrics.jsonl (see {self._log()})"

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; close() says so

    def _log(self) -> Path:
        path = self._cache / "logs" / "track.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _Mirror:
    """One stage as an aim run."""

    def __init__(self, repo: str, message: Mapping[str, Any]) -> None:
        from aim.sdk.run import Run

        facts = message["facts"]
        self._run = Run(repo=repo, experiment=facts["recipe"], capture_terminal_logs=False)
        self._run.name = f"{facts['recipe']}/{facts['stage']}"
        for name, value in facts.items():
            self._run[name] = value
        self._paths = [Path(message["metrics"]), Path(message["finished"])]
        self._follower = Follower(self._paths[0], offset=message["offset"])

    def copy(self) -> bool:
        """Mirrors new lines; true once the stage is finished and everything is copied."""
        moved = self._paths[1].exists()
        if moved:
            self._follower.moved_to(self._paths[1])
        for line in self._follower.new_lines():
            for name, value in line.items():
                if name not in NOT_TRACKED and isinstance(value, int | float):
                    subset, short = ("validation", name[11:]) if name.startswith("validation_") else ("train", name)
                    self._run.track(value, name=short, step=line.get("step"), context={"subset": subset})
        return moved

    def close(self) -> None:
        """Ends the run, and enters it in aim's index, which otherwise only the server of `aim up` does."""
        from aim.sdk.index_manager import RepoIndexManager

        self._run.close()
        RepoIndexManager.get_index_manager(self._run.repo).index(self._run.hash)


def main() -> None:
    """Follows what standard input names, one JSON object a line, until it closes."""
    cache = Path(sys.argv[1])
    arriving: list[dict[str, Any]] = []
    closed = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            arriving.append(json.loads(line))
        closed.set()

    threading.Thread(target=read, daemon=True).start()
    repo = cache / "aim"
    repo.mkdir(parents=True, exist_ok=True)
    with (repo / "writer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_runs: list[_Mirror] = []
        while True:
            last_round = closed.is_set()
            while arriving:
                open_runs.append(_Mirror(str(repo), arriving.pop(0)))
            for mirror in list(open_runs):
                if mirror.copy() or last_round:
                    mirror.close()
                    open_runs.remove(mirror)
            if last_round and not arriving:
                return
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()

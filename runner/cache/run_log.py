"""The run log: which keys the last runs used, for `run gc`. Running and planning do not need it.

A run is recent by its number or by its days before the newest run, so a clock that jumps makes no run old.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.files import read_bounded, write_whole

RECENT_RUNS, RECENT_DAYS = 20, 30
FOLDER = "runs"
LARGEST = 64 * 2**20  # bytes of an entry


@dataclass(frozen=True)
class Run:
    """The last run of one resolved recipe."""

    recipe: str  # name
    path: str
    time: float  # seconds since 1970
    names: tuple[str, ...]  # <kind>-<key> of every stage with a known key
    overrides: tuple[str, ...] = ()  # of --set


def log_run(
    cache: Path,
    recipe: Path,
    resolved: Mapping[str, Any],
    names: Iterable[str],
    *,
    overrides: Iterable[str] = (),
    until: str | None,
    complete: bool,
) -> None:
    """Logs the keys that a run of `recipe` uses. A `complete` run replaces the entry of the run before; an incomplete one adds
    to it, so that a failing run makes no artifact of an earlier run collectable. A read-only cache is not an error.
    """
    path = str(recipe.resolve())
    identity = json.dumps([path, until, resolved], sort_keys=True)
    entry = cache / FOLDER / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
    before = _read(entry)
    kept = set(before.names) if before and not complete else set()
    run = Run(str(resolved["name"]), path, time.time(), tuple(sorted(kept.union(names))), tuple(overrides))
    with contextlib.suppress(OSError):
        write_whole(entry, json.dumps(asdict(run), indent=2), durable=False)


def _read(path: Path) -> Run | None:
    try:
        run = Run(**json.loads(read_bounded(path, LARGEST)))
        return Run(str(run.recipe), str(run.path), float(run.time), tuple(map(str, run.names)), tuple(map(str, run.overrides)))
    except (OSError, ValueError, TypeError, RecursionError):  # gone, or edited by hand
        return None


def logged_runs(cache: Path) -> list[tuple[Path, Run]]:
    """Every logged run with the file of its entry, newest first."""
    entries = [(path, run) for path in (cache / FOLDER).glob("*.json") if (run := _read(path))]
    return sorted(entries, key=lambda entry: entry[1].time, reverse=True)


def recent(logged: list[tuple[Path, Run]]) -> list[Run]:
    """The runs that count as recent."""
    if not logged:
        return []
    newest = logged[0][1].time
    return [
        run for place, (_, run) in enumerate(logged) if place < RECENT_RUNS or newest - run.time <= RECENT_DAYS * 24 * 3600
    ]

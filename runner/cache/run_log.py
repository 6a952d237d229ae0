"""Notes of which keys the last runs used: what `run gc` goes by. A note is never needed to run or to plan.

Recent are the last runs by number and by days before the newest of them, so that a clock that jumped makes none of them old.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from runner.files import write_whole
from runner.recipe.recipe import Recipe

RECENT_RUNS, RECENT_DAYS = 20, 30
FOLDER = "runs"


@dataclass(frozen=True)
class Run:
    """The last run of one recipe as resolved."""

    recipe: str  # its name
    path: str
    time: float  # seconds since 1970
    names: tuple[str, ...]  # <kind>-<key> of every stage whose key was known


def note_run(cache: Path, recipe: Recipe, names: Iterable[str], *, until: str | None, complete: bool) -> None:
    """Notes what a run uses, in place of what the last run of the same recipe noted; until it is `complete`, beside that, so
    that a run that fails leaves nothing of an earlier one to be collected. A cache may refuse to be written.
    """
    path = str(recipe.path.resolve())
    identity = json.dumps([path, until, recipe.resolved()], sort_keys=True)
    place = cache / FOLDER / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
    before = _read(place)
    kept = set(before.names) if before and not complete else set()
    run = Run(recipe.head.name, path, time.time(), tuple(sorted(kept.union(names))))
    with contextlib.suppress(OSError):
        write_whole(place, json.dumps(asdict(run), indent=2), durable=False)


def _read(path: Path) -> Run | None:
    try:
        run = Run(**json.loads(path.read_text(encoding="utf-8")))
        return Run(str(run.recipe), str(run.path), float(run.time), tuple(map(str, run.names)))
    except (OSError, ValueError, TypeError):  # gone, or edited by somebody: it is only a note
        return None


def noted_runs(cache: Path) -> list[tuple[Path, Run]]:
    """Every run that is noted, with its note, the newest first."""
    notes = [(path, run) for path in (cache / FOLDER).glob("*.json") if (run := _read(path))]
    return sorted(notes, key=lambda noted: noted[1].time, reverse=True)


def recent(noted: list[tuple[Path, Run]]) -> list[Run]:
    """The runs that count as recent."""
    if not noted:
        return []
    newest = noted[0][1].time
    return [run for place, (_, run) in enumerate(noted) if place < RECENT_RUNS or newest - run.time <= RECENT_DAYS * 24 * 3600]

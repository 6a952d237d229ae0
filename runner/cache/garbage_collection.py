"""`run gc`: which artifacts of a cache to remove, in which order, and how many bytes that frees. Records stay: planning needs
them, and a removed artifact is made again only if a stage must read it.

Removing takes the key's lock, so nothing in use is removed. Several collections may run at once: what one of them does not
find any more, another has removed.
"""

import contextlib
import glob
import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runner.artifacts import SCRATCH
from runner.cache.integrity import ARTIFACT_NAME
from runner.cache.run_log import RECENT_DAYS, Run, logged_runs, recent
from runner.cache.store import Store
from runner.file_locks import is_locked

DAY_SECONDS = 24 * 3600.0
PLACES = ("stages", "work", "aside", "arriving")  # folders of a cache that grow


@dataclass(frozen=True)
class Item:
    """Something that may be removed."""

    path: Path
    reason: str
    name: str | None = None  # <kind>-<key> whose lock guards it


class DiskUsage:
    """Bytes on disk of folders that share files by hard links, as a release does with its checkpoint: removing one of two
    links frees nothing.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.total = 0  # bytes of the remaining folders, each file once
        self._files: dict[Path, list[tuple[int, int]]] = {}  # folder -> (device, inode) of each link in it
        self._sizes: dict[tuple[int, int], int] = {}
        self._links: Counter[tuple[int, int]] = Counter()  # remaining links of each file, anywhere
        self._inside: Counter[tuple[int, int]] = Counter()  # remaining links of each file in the folders
        for folder in folders:
            scratch = folder / SCRATCH
            self._add(folder, [status for path, status in _statuses(folder) if scratch not in path.parents])
            self._add(scratch, [status for _, status in _statuses(scratch)])

    def _add(self, folder: Path, statuses: Iterable[os.stat_result]) -> None:
        self._files[folder] = []
        for status in statuses:
            file = (status.st_dev, status.st_ino)
            if file not in self._sizes:
                self.total += status.st_size
                self._links[file], self._sizes[file] = status.st_nlink, status.st_size
            self._files[folder].append(file)
            self._inside[file] += 1

    def remove(self, folder: Path) -> int:
        """Counts a folder as removed; returns how many bytes that frees."""
        freed = 0
        for file in [*self._files.pop(folder, []), *self._files.pop(folder / SCRATCH, [])]:
            self._links[file] -= 1
            self._inside[file] -= 1
            freed += 0 if self._links[file] else self._sizes[file]
            self.total -= 0 if self._inside[file] else self._sizes[file]
        return freed


def _statuses(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or path.is_file():
            yield path, path.lstat()
    for place, _, files in os.walk(path):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # an active run may remove it
                yield Path(place, file), Path(place, file).lstat()


@dataclass(frozen=True)
class Outcome:
    """The result of a collection."""

    removed: list[tuple[Item, int]]  # with the bytes that each freed
    in_use: list[Item]
    left: int  # bytes

    @property
    def freed(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.removed)


def collect(store: Store, *, named: Collection[str], forget_runs: bool, keep_size: int | None, dry_run: bool) -> Outcome:
    """Removes leftovers, then the artifacts that neither `named` nor a recent run reaches. With `keep_size`, in bytes, instead
    removes artifacts that are not `named`, least recently used first, until no more than that is left. `dry_run` removes
    nothing and returns the same.
    """
    logged = logged_runs(store.root)
    kept = [] if forget_runs else recent(logged)
    reached = {*named, *(name for run in kept for name in run.names)}
    usage = DiskUsage(path for place in PLACES for path in _inside(store.root / place))
    outcome = Outcome([], [], 0)

    def take(item: Item) -> None:
        if _is_free(store, item) if dry_run else _remove(store, item):
            outcome.removed.append((item, usage.remove(item.path)))
        else:
            outcome.in_use.append(item)

    for item in [*leftovers(store, reached), *unused_files(store, kept, reached)]:
        take(item)
    if keep_size is None:
        for item in unreached(store, reached):
            take(item)
    else:
        for item in oldest_first(store, [run for _, run in logged]):
            if usage.total <= keep_size:
                break
            if item.name not in named:
                take(item)
    if not dry_run:
        for path, run in logged:
            if run not in kept:
                path.unlink(missing_ok=True)
        for name in sorted(_names_of_keys(store) - reached):
            _forget(store, name)
    return replace(outcome, left=usage.total)


def leftovers(store: Store, reached: Collection[str]) -> list[Item]:
    """What no run continues: files set aside, aborted downloads, and work on keys that are not `reached`."""
    found = [Item(path, "set aside") for path in _inside(store.root / "aside")]
    found += [Item(path, "never arrived", _key_of(path.name)) for path in _inside(store.root / "arriving")]
    for work in _inside(store.root / "work"):
        name = _key_of(work.name) or work.name
        if (store.root / "stages" / name).exists():
            found.append(Item(work, "finished since", name))
        elif name not in reached:
            found.append(Item(work, "left by a run that no recent run continues", name))
        elif not store.is_work(work, name):
            found.append(Item(work, "left by a run that another machine took over", name))
    for folder in _inside(store.root / "stages"):
        if (folder / SCRATCH).exists():
            found.append(Item(folder / SCRATCH, "scratch of a finished stage", folder.name))
    return found


def unused_files(store: Store, kept: Collection[Run], reached: Collection[str]) -> list[Item]:
    """What commands left beside the artifacts: downloads of published models that no recent run uses, and proofs of stages
    that are not `reached`.
    """
    used = [Path(run.path) for run in kept]
    found = []
    for folder in _inside(store.root / "published"):
        unused = folder.name != "snapshots" and not any(path.is_relative_to(folder) for path in used)
        if unused and _age(folder) > DAY_SECONDS:  # else it may be on its way
            found.append(Item(folder, "a published model that no recent run uses"))
    for path in _inside(store.root / "published" / "snapshots"):
        if _age(path) > RECENT_DAYS * DAY_SECONDS:
            found.append(Item(path, "the address of a published model, asked for long ago"))
    keys = {name.rpartition("-")[2] for name in reached}
    for path in _inside(store.root / "proofs"):
        if path.name.partition(".")[0] not in keys and _age(path) > DAY_SECONDS and not is_locked(path.with_suffix(".log")):
            found.append(Item(path, "a proof for a stage that no recent run reaches"))
    return found


def _names_of_keys(store: Store) -> set[str]:
    """The keys of which there is a log of this machine, an old log of another one, or a lease, and nothing else."""
    logs = [path for path in _inside(store.root / "logs") if store.is_own_log(path) or _age(path) > RECENT_DAYS * DAY_SECONDS]
    names = {_key_of(path.name) for path in [*logs, *_inside(store.root / "leases")] if not path.name.startswith(".")}
    there = {_key_of(path.name) for place in ("stages", "work") for path in _inside(store.root / place)}
    return {name for name in names - there if name}


def _forget(store: Store, name: str) -> None:
    """Removes the logs and the lease of a key that is free."""
    match = ARTIFACT_NAME.fullmatch(name)
    if match is None:
        return
    with store.lock_if_free(match["kind"], match["key"]) as free:
        if free:
            store.remove_lease(match["kind"], match["key"])
            for path in (store.root / "logs").glob(f"{glob.escape(name)}.*"):
                if store.is_own_log(path) or _age(path) > RECENT_DAYS * DAY_SECONDS:
                    path.unlink(missing_ok=True)  # the lock ends with it, so nothing is done after this


def unreached(store: Store, reached: Collection[str]) -> list[Item]:
    """The artifacts that are not `reached`."""
    return [
        Item(folder, "no recipe or recent run reaches it", folder.name)
        for folder in _inside(store.root / "stages")
        if folder.name not in reached
    ]


def oldest_first(store: Store, runs: Iterable[Run]) -> list[Item]:
    """All artifacts, least recently used first."""
    used: dict[str, float] = {}
    for run in runs:
        for name in run.names:
            used[name] = max(run.time, used.get(name, run.time))
    folders = sorted(_inside(store.root / "stages"), key=lambda folder: used.get(folder.name, time.time() - _age(folder)))
    return [Item(folder, "least recently used", folder.name) for folder in folders]


def _is_free(store: Store, item: Item) -> bool:
    """Whether the lock of an item's key is free. Writes nothing."""
    match = ARTIFACT_NAME.fullmatch(item.name or "")
    return match is None or store.is_free(match["kind"], match["key"])


def _remove(store: Store, item: Item) -> bool:
    """Removes an item under its lock; false if it is in use. An artifact is renamed away before its files are deleted."""
    match = ARTIFACT_NAME.fullmatch(item.name or "")
    if match is None:
        _delete(item.path)
        return True
    with store.lock_if_free(match["kind"], match["key"]) as free:
        if not free:
            return False
        if not item.path.exists():
            return True  # another collection was first
        if item.path.parent == store.root / "stages":
            record = store.stored_record(match["kind"], match["key"])
            if record is not None and not store.record_path(record.key).exists():
                store.remember(record, origin=store.origins.of(record))
            _delete(store.move_aside(item.path))
        else:
            store.confirm(match["kind"], match["key"])
            _delete(item.path)
        return True


def _delete(path: Path) -> None:
    """Removes a file or folder, of which another collection may remove parts at the same time."""
    while os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _age(path: Path) -> float:
    """Seconds since the last change of a file, by its disk's clock and this machine's; 0 if it is gone."""
    try:
        return max(0.0, time.time() - path.lstat().st_mtime)
    except OSError:
        return 0.0


def _key_of(name: str) -> str | None:
    """The <kind>-<key> that the name of a folder in arriving/ or work/ begins with."""
    match = ARTIFACT_NAME.match(name.lstrip("."))
    return match[0] if match else None

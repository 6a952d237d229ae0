"""Leases: which machine holds a key of a shared cache, where the file locks of one machine may not reach the others.

    leases/<kind>-<key>/free              the key's token, while no process has exclusive use
    leases/<kind>-<key>/alone-<lease>     the same token, renamed by the process that has it
    leases/<kind>-<key>/reading-<lease>   one for each process that reads the artifact
    leases/<kind>-<key>/work              the key's current folder in work/, once a lease was taken over; during a takeover
                                          the new one, and on the next line the one that is renamed to it
    holders/<holder>                      identity of a process, and a counter that it raises every second

A key has one token, which only moves by rename, so exactly one of several processes gets it. A holder whose counter does not
change for a while, by the watcher's own clock, counts as dead: the watcher renames the token, and a holder that wakes up late
finds its token gone. Between processes of one machine `flock` decides, and the lease of a local process without its flock is
dead at once. Clocks of different machines are never compared.
"""

import contextlib
import os
import shutil
import time
import uuid
from functools import cached_property
from pathlib import Path
from typing import Literal

from llm.files import TEMPORARY
from runner.cache import heartbeat
from runner.cache.heartbeat import Holder, Watch, this_machine
from runner.errors import StageError
from runner.files import write_whole

FREE, ALONE, READING, WORK = "free", "alone-", "reading-", "work"
WEIGHTS = ".safetensors"
UNKNOWN = "another process"


class LeaseLostError(StageError):
    """Another machine took over the key of this run, because it had no heartbeat; the result of this run is dropped."""


class Lease:
    """One hold of one key, exclusive or for reading."""

    def __init__(self, folder: Path, name: str, holder: Holder) -> None:
        self._folder, self.name, self._holder = folder, name, holder
        self._confirmed = 0
        self._place: Path | None = None
        self.lost = False

    def take(self, token: Path) -> bool:
        """Takes exclusive use by renaming the token; false if another process was first."""
        with self._holder.lock:
            mine = self._folder / f"{ALONE}{self.name}"
            if not _renamed(token, mine):
                return False
            self._place = mine
        self._holder.add(self.name, self.look)
        return True

    def read(self) -> bool:
        """Marks the key as read; false if its folder was removed meanwhile."""
        self._holder.add(self.name, lambda: None)
        self._place = self._folder / f"{READING}{self.name}"
        try:
            self._place.touch()
        except FileNotFoundError:
            return False
        return True

    def look(self) -> None:
        """Checks whether the token was taken away; a network file system may show it some seconds late."""
        with self._holder.lock:
            try:
                if self._place is not None:
                    self._place.stat()
            except FileNotFoundError:
                self.lost = True
            except OSError:
                return  # a temporary fault of the file system

    def confirm(self) -> None:
        """LeaseLostError unless exclusive use still holds, checked without caches by renaming the token."""
        with self._holder.lock:
            if self._place is not None:
                self._confirmed += 1
                following = self._folder / f"{ALONE}{self.name}.{self._confirmed}"
                self.lost = not _renamed(self._place, following) or self.lost
                self._place = following
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """LeaseLostError if the token is known to be taken away."""
        if self.lost:
            raise LeaseLostError(
                f"{self._folder.name}: this run had no heartbeat for {heartbeat.DEAD_SECONDS:.0f} s, and "
                f"another took over its "
                "work; its result is dropped"
            )

    def release(self) -> None:
        """Gives the token back, or removes the mark of a reader."""
        with self._holder.lock:
            place, self._place = self._place, None
            if place is not None and place.name.startswith(ALONE):
                _renamed(place, self._folder / FREE)
            elif place is not None:
                with contextlib.suppress(OSError):
                    place.unlink(missing_ok=True)
        self._holder.remove(self.name)


class Leases:
    """The leases of one cache in one process. Callers hold the key's flock on this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: dict[str, Lease] = {}  # alone

    @cached_property
    def _holder(self) -> Holder:
        return Holder(self._root / "holders")

    @cached_property
    def _watch(self) -> Watch:
        return Watch(self._root / "holders")

    def try_alone(self, name: str) -> Lease | str:
        """Takes exclusive use of a key until `release`; else returns who holds it. Callers repeat the attempt."""
        folder = self._made(name)
        token = _token(folder)
        if token is None:
            return UNKNOWN
        if token.name != FREE and not (dead := self._is_dead(token)):
            return self._named(token)
        if reader := self._reader(folder):
            return reader
        lease = Lease(folder, self._holder.new_lease(), self._holder)
        if not lease.take(token):
            return UNKNOWN
        if token.name != FREE and dead == "elsewhere":
            self._leave_work_behind(name, lease)
        else:
            self._finish_takeover(name, lease)
        if reader := self._reader(folder):  # one that came between: each leaves its mark before it checks
            lease.release()
            return reader
        self._held[name] = lease
        return lease

    def try_reading(self, name: str) -> Lease | str:
        """Prevents exclusive use of a key until the lease is released; else returns who has it."""
        folder = self._made(name)
        token = _token(folder)
        if token is not None and token.name != FREE and (dead := self._is_dead(token)):
            takeover = Lease(folder, self._holder.new_lease(), self._holder)
            if takeover.take(token):  # so that its holder, should it wake up, finds its token gone
                if dead == "elsewhere":
                    self._leave_work_behind(name, takeover)
                takeover.release()
            token = _token(folder)
        if token is None or token.name != FREE:
            return UNKNOWN if token is None else self._named(token)
        lease = Lease(folder, self._holder.new_lease(), self._holder)
        marked = lease.read()
        token = _token(folder)
        if marked and token is not None and token.name == FREE:
            return lease
        lease.release()  # another process came between: each leaves its mark before it checks
        return UNKNOWN if token is None else self._named(token)

    def release(self, name: str) -> None:
        """Ends exclusive use of a key."""
        self._held.pop(name).release()

    def confirm(self, name: str) -> None:
        """LeaseLostError if exclusive use was lost; for use right before a permanent change."""
        if name in self._held:
            self._held[name].confirm()

    def raise_if_lost(self, name: str, *, look: bool = False) -> None:
        """LeaseLostError if exclusive use is known to be lost; with `look`, checks first."""
        if name in self._held:
            if look:
                self._held[name].look()
            self._held[name].raise_if_lost()

    def holder_of(self, name: str) -> str | None:
        """The process with exclusive use of a key, else one of its readers; None if there is none."""
        folder = self._root / "leases" / name
        token = _token(folder)
        held = [token] if token is not None and token.name != FREE else _marks(folder)
        return self._named(held[0]) if held else None

    def is_free(self, name: str) -> bool:
        """Whether no other machine holds or reads the key, after watching until that is known. Writes nothing."""
        folder, before = self._root / "leases" / name, dict[str, int]()
        while True:
            token = _token(folder)
            held = [*_marks(folder), *([token] if token is not None and token.name != FREE else [])]
            alive = [place for place in held if not self._is_dead(place)]
            if not alive:
                return True
            beats = {holder: self._watch.beats(holder) for holder in map(_holder, alive)}
            if any(count > before.setdefault(holder, count) for holder, count in beats.items()):
                return False
            time.sleep(0.1)

    def work_name(self, name: str) -> str:
        """The name of the key's current folder in work/."""
        try:
            new, _, old = (self._root / "leases" / name / WORK).read_text(encoding="utf-8").partition("\n")
        except (FileNotFoundError, NotADirectoryError):
            return name
        return old if old and not (self._root / "work" / new).exists() else new or name

    def forget_work(self, name: str) -> None:
        """Lets the next folder in work/ have the plain name again."""
        with contextlib.suppress(OSError):
            (self._root / "leases" / name / WORK).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes the folder of a key of which this process has exclusive use; `release` ends that."""
        folder = self._root / "leases" / name
        self.confirm(name)
        if not self._has_work(name):
            away = folder.with_name(f".{name}.{uuid.uuid4().hex}")
            with contextlib.suppress(FileNotFoundError):
                folder.rename(away)
            shutil.rmtree(away, ignore_errors=True)

    def _has_work(self, name: str) -> bool:
        return (self._root / "work" / self.work_name(name)).exists()

    def _made(self, name: str) -> Path:
        """The folder of a key with its one token, made if it is missing."""
        folder = self._root / "leases" / name
        if not folder.is_dir():
            new = folder.with_name(f".{name}.{uuid.uuid4().hex}")
            new.mkdir(parents=True)
            (new / FREE).touch()
            with contextlib.suppress(OSError):
                new.rename(folder)
                return folder
            shutil.rmtree(new)  # another process was first
        return folder

    def _leave_work_behind(self, name: str, lease: Lease) -> None:
        """Renames the key's folder in work/: a holder that wakes up finds nothing under the old name. A kill at any step loses
        nothing, since the note names both places until the rename is done.

        What the holder may still have open is then replaced by copies, one file at a time, or removed if it was not complete.
        Weights are not copied, however many gigabytes they have: they are complete under their names, so nobody writes to
        them.
        """
        note, work = self._root / "leases" / name / WORK, self._root / "work"
        old, new = self.work_name(name), f"{name}.{lease.name}"
        write_whole(note, f"{new}\n{old}")
        with contextlib.suppress(FileNotFoundError):
            (work / old).rename(work / new)
        for place, _, files in os.walk(work / new):
            for path in (Path(place, file) for file in files):
                if TEMPORARY in (path.suffix, path.parent.suffix):
                    path.unlink(missing_ok=True)
                elif path.suffix != WEIGHTS and path.is_file() and not path.is_symlink():
                    _replace_by_copy(path)
        write_whole(note, new)

    def _finish_takeover(self, name: str, lease: Lease) -> None:
        """Repeats a takeover that was killed: the holder before it may still write to the folder."""
        with contextlib.suppress(FileNotFoundError):
            if "\n" in (self._root / "leases" / name / WORK).read_text(encoding="utf-8"):
                self._leave_work_behind(name, lease)

    def _is_dead(self, place: Path) -> Literal["", "here", "elsewhere"]:
        """Whether the holder of a token or mark is dead, and if so whether it ran on this machine; "" while it is alive."""
        identity = self._watch.identity(_holder(place))
        if identity is not None and identity.machine == this_machine().machine:
            return "here"  # the caller holds the flock of this machine
        return "elsewhere" if self._watch.is_dead(_holder(place)) else ""

    def _reader(self, folder: Path) -> str | None:
        """One of the readers; removes the marks of dead ones."""
        for mark in _marks(folder):
            if not self._is_dead(mark):
                return self._named(mark)
            mark.unlink(missing_ok=True)
        return None

    def _named(self, place: Path) -> str:
        return str(self._watch.identity(_holder(place)) or UNKNOWN)


def _token(folder: Path) -> Path | None:
    return next((folder / name for name in _names(folder) if name == FREE or name.startswith(ALONE)), None)


def _marks(folder: Path) -> list[Path]:
    return [folder / name for name in _names(folder) if name.startswith(READING)]


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(folder)  # noqa: PTH208  # only names are needed
    return []


def _holder(place: Path) -> str:
    """The holder of a token or mark: `alone-<holder>.<number>...`."""
    return place.name.partition("-")[2].partition(".")[0]


def _replace_by_copy(path: Path) -> None:
    """Puts a copy in the place of a file, so that who has it open writes to the old one."""
    copy = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    with contextlib.suppress(FileNotFoundError):
        shutil.copy2(path, copy)
        copy.replace(path)


def _renamed(place: Path, target: Path) -> bool:
    """Whether this process moved the file at `place`."""
    try:
        place.rename(target)
    except FileNotFoundError:
        return target.name != FREE and target.exists()  # NFS may lose a reply and repeat the rename
    return True

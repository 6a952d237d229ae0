"""Leases: who holds a key of a cache that several machines share, where the locks of one machine may not reach the others.

    leases/<kind>-<key>/free              the key's token: nobody holds it alone
    leases/<kind>-<key>/alone-<lease>     the same token, renamed by the one who does
    leases/<kind>-<key>/reading-<lease>   one of those who read its artifact
    leases/<kind>-<key>/work              name of the folder in work/ that is the key's now, once a lease was taken over
    holders/<holder>                      who a holder is, and a counter that it raises every second

A key has one token, and only a rename moves it, so that of several who want it one wins. A holder whose counter stands still
for a while by the clock of who watches it is taken for dead: then the token is renamed under it, and if it wakes up late, its
next look finds the token gone. Between processes of one machine `flock` decides, and a lease of a process of this machine that
holds no lock any more is dead at once. Clocks of different machines are never compared.
"""

import contextlib
import os
import shutil
import time
import uuid
from functools import cached_property
from pathlib import Path
from typing import Literal

from runner.cache import heartbeat
from runner.cache.heartbeat import Holder, Watch, this_machine
from runner.errors import StageError

FREE, ALONE, READING, WORK = "free", "alone-", "reading-", "work"
UNKNOWN = "another process"


class LeaseLostError(StageError):
    """A run that others had to take for dead came back: another holds its key, and what it made meanwhile is dropped."""


class Lease:
    """One holding of one key, alone or by reading."""

    def __init__(self, folder: Path, name: str, holder: Holder) -> None:
        self._folder, self.name, self._holder = folder, name, holder
        self._confirmed = 0
        self._place: Path | None = None
        self.lost = False

    def take(self, token: Path) -> bool:
        """Holds the key alone by renaming its token; false if somebody else was quicker."""
        with self._holder.lock:
            mine = self._folder / f"{ALONE}{self.name}"
            if not _renamed(token, mine):
                return False
            self._place = mine
        self._holder.add(self.name, self.look)
        return True

    def read(self) -> None:
        """Marks the key as read."""
        self._holder.add(self.name, lambda: None)
        self._place = self._folder / f"{READING}{self.name}"
        self._place.touch()

    def look(self) -> None:
        """Notes if the token was taken away; a disk of the network may tell so some seconds late."""
        with self._holder.lock:
            try:
                if self._place is not None:
                    self._place.stat()
            except FileNotFoundError:
                self.lost = True
            except OSError:
                return  # the disk may answer again

    def confirm(self) -> None:
        """LeaseLostError unless the key is still held alone; asked of the disk itself, by renaming the token."""
        with self._holder.lock:
            if self._place is not None:
                self._confirmed += 1
                following = self._folder / f"{ALONE}{self.name}.{self._confirmed}"
                self.lost = not _renamed(self._place, following) or self.lost
                self._place = following
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """LeaseLostError if the key was seen to be another's."""
        if self.lost:
            raise LeaseLostError(
                f"{self._folder.name}: this run did not answer for {heartbeat.DEAD_SECONDS:.0f} s, and another took over its "
                "work; what it made is dropped"
            )

    def release(self) -> None:
        """Gives the token back, or takes the mark away, if it is still here."""
        with self._holder.lock:
            place, self._place = self._place, None
            if place is not None and place.name.startswith(ALONE):
                _renamed(place, self._folder / FREE)
            elif place is not None:
                with contextlib.suppress(OSError):
                    place.unlink(missing_ok=True)
        self._holder.remove(self.name)


class Leases:
    """The leases of one cache, as one process takes and sees them. Who asks for one holds the key's lock on this machine."""

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
        """Holds a key alone, until `release`; else says who is in the way. To be tried again and again."""
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
        if reader := self._reader(folder):  # who came between: each shows itself before it looks
            lease.release()
            return reader
        self._held[name] = lease
        return lease

    def try_reading(self, name: str) -> Lease | str:
        """Keeps others from holding a key alone, until the lease is released; else says who is in the way."""
        folder = self._made(name)
        token = _token(folder)
        if token is not None and token.name != FREE and (dead := self._is_dead(token)):
            over = Lease(folder, self._holder.new_lease(), self._holder)
            if over.take(token):  # should its holder wake up, it finds that it may no longer remove anything
                if dead == "elsewhere":
                    self._leave_work_behind(name, over)
                over.release()
            token = _token(folder)
        if token is None or token.name != FREE:
            return UNKNOWN if token is None else self._named(token)
        lease = Lease(folder, self._holder.new_lease(), self._holder)
        lease.read()
        token = _token(folder)
        if token is not None and token.name == FREE:
            return lease
        lease.release()  # somebody came between: each shows itself before it looks
        return UNKNOWN if token is None else self._named(token)

    def release(self, name: str) -> None:
        """Gives back a key that was held alone."""
        self._held.pop(name).release()

    def confirm(self, name: str) -> None:
        """LeaseLostError if the key was held alone and is no longer: to be asked right before what cannot be undone."""
        if name in self._held:
            self._held[name].confirm()

    def raise_if_lost(self, name: str, *, look: bool = False) -> None:
        """LeaseLostError if the key was held alone and is known to be another's by now; with `look`, looks first."""
        if name in self._held:
            if look:
                self._held[name].look()
            self._held[name].raise_if_lost()

    def holder_of(self, name: str) -> str | None:
        """Who holds a key alone, else one of those who read; None if nobody is seen to."""
        folder = self._root / "leases" / name
        token = _token(folder)
        held = [token] if token is not None and token.name != FREE else _marks(folder)
        return self._named(held[0]) if held else None

    def is_free(self, name: str) -> bool:
        """Whether nobody of another machine holds the key or reads, after watching until that is known; leaves no trace."""
        folder, before = self._root / "leases" / name, dict[str, int]()
        while True:
            token = _token(folder)
            held = [*_marks(folder), *([token] if token is not None and token.name != FREE else [])]
            living = [place for place in held if not self._is_dead(place)]
            if not living:
                return True
            beats = {holder: self._watch.beats(holder) for holder in map(_holder, living)}
            if any(count > before.setdefault(holder, count) for holder, count in beats.items()):
                return False
            time.sleep(0.1)

    def work_name(self, name: str) -> str:
        """What the folder in work/ is called that is the key's now."""
        try:
            return (self._root / "leases" / name / WORK).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return name

    def forget_work(self, name: str) -> None:
        """The next folder in work/ may have the plain name again."""
        with contextlib.suppress(OSError):
            (self._root / "leases" / name / WORK).unlink(missing_ok=True)

    def _made(self, name: str) -> Path:
        """The folder of a key, in which there is one token."""
        folder = self._root / "leases" / name
        if not folder.is_dir():
            begun = folder.with_name(f".{name}.{uuid.uuid4().hex}")
            begun.mkdir(parents=True)
            (begun / FREE).touch()
            with contextlib.suppress(OSError):
                begun.rename(folder)
                return folder
            shutil.rmtree(begun)  # somebody else was quicker
        return folder

    def _leave_work_behind(self, name: str, lease: Lease) -> None:
        """Gives the key a new folder in work/ that carries the lease, with a copy of what was in the old one: a holder that
        wakes up still writes there, by the old name and into files that it has open.
        """
        old = self._root / "work" / self.work_name(name)
        new = old.with_name(f"{name}.{lease.name}")
        left, copy = old.with_name(f".{new.name}.left"), old.with_name(f".{new.name}.copy")
        with contextlib.suppress(FileNotFoundError):
            old.rename(left)
            shutil.copytree(left, copy, symlinks=True)
            copy.rename(new)
        mark = self._root / "leases" / name / f".{WORK}.{lease.name}"
        mark.write_text(new.name, encoding="utf-8")
        mark.replace(mark.with_name(WORK))
        shutil.rmtree(left, ignore_errors=True)

    def _is_dead(self, place: Path) -> Literal["", "here", "elsewhere"]:
        """Where the holder of a token or mark was, if it is gone: of this machine, or not."""
        identity = self._watch.identity(_holder(place))
        if identity is not None and identity.machine == this_machine().machine:
            return "here"  # whoever asks holds the lock of this machine
        return "elsewhere" if self._watch.is_dead(_holder(place)) else ""

    def _reader(self, folder: Path) -> str | None:
        """One who reads; the marks of those who are gone are removed."""
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
        return os.listdir(folder)  # noqa: PTH208  # names are all that is wanted
    return []


def _holder(place: Path) -> str:
    """The holder of a token or mark: `alone-<holder>.<number>...`."""
    return place.name.partition("-")[2].partition(".")[0]


def _renamed(place: Path, target: Path) -> bool:
    """Whether this process moved a file away from `place`, of which there is one."""
    try:
        place.rename(target)
    except FileNotFoundError:
        return target.name != FREE and target.exists()  # on NFS an answer may be lost, and the rename asked for twice
    return True

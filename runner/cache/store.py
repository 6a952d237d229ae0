"""The cache folder: where finished artifacts, work in progress, records and locks lie. A stage is finished if and only if its
folder is under `stages/`.

    cache/
      stages/<kind>-<key>/    finished artifacts, each with its record.json
      work/<kind>-<key>/      an artifact that grows; a crash leaves it, and the same key goes on in it
      records/<key>.json      a copy of each record, which outlives the artifact
      logs/<kind>-<key>.<machine>.log    what the workers printed there; the file is also the machine's lock of the key
      leases/<kind>-<key>/    who holds the key among machines that share the cache; holders/ tells who of them lives
      arriving/               artifacts on their way from a remote
      aside/                  artifacts that were forced or found damaged
      runs/                   which keys each of the last runs used
      receipts/               what was pushed where
      published/              recipes of published models, and their data where it was found
      compiled/               what was compiled here: by torch.compile, and attention
      digests.json            memo of file digests by path, size, time and inode

The lock of a key is held alone by who makes, fetches or removes its artifact, and together by those who read it. It has two
parts: `flock` between the processes of a machine, which is free as soon as the last of them ends, and on top of it a lease
between machines (`runner.cache.leases`).
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from runner.artifacts import RECORD, SCRATCH
from runner.cache.digests import DigestMemo
from runner.cache.heartbeat import this_machine
from runner.cache.integrity import damages
from runner.cache.leases import UNKNOWN, Lease, Leases
from runner.cache.record import DamagedError, Record, digest_of
from runner.errors import StageError
from runner.files import fsync, write_whole
from runner.stage import Stage

T = TypeVar("T")

UNKNOWN_LOOKS = 5  # at a lock whose holder has not said its name yet, before somebody is told that it waits
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class NotWritableError(StageError):
    """There is work to do, and the cache can only be read."""


class Store:
    """One cache folder. Nothing is written before the first stage runs, except the memo of digests."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.digests = DigestMemo(self.root / "digests.json")
        self._leases = Leases(self.root)

    def folder(self, stage: Stage | str, key: str) -> Path:
        """Where the finished artifact is."""
        return self.root / "stages" / _name(stage, key)

    def work(self, stage: Stage | str, key: str) -> Path:
        """Where the artifact grows; another folder after a lease of the key was taken over."""
        return self.root / "work" / self._leases.work_name(_name(stage, key))

    def is_work(self, folder: Path, name: str) -> bool:
        """Whether a folder in work/ is the one in which the artifact <kind>-<key> grows."""
        return folder.name == self._leases.work_name(name)

    @property
    def compiled(self) -> Path:
        """Where what is compiled is kept."""
        return self.root / "compiled"

    def log(self, stage: Stage | str, key: str) -> Path:
        """What the workers print on this machine."""
        return self.root / "logs" / f"{_name(stage, key)}.{re.sub(r'[^A-Za-z0-9_.-]', '_', this_machine().host)}.log"

    def record(self, stage: Stage | str, key: str) -> Record | None:
        """The record of a key, whether or not its artifact is still here; one that is damaged is as good as none."""
        for path in (self.folder(stage, key) / RECORD, self.record_path(key)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, DamagedError):
                record = Record.unsealed(path.read_bytes())
                if record.name == _name(stage, key):
                    return record
        return None

    def has_damaged_record(self, stage: Stage | str, key: str) -> bool:
        """Whether something is kept as the record of a key that has none."""
        return self.record_path(key).exists() or (self.folder(stage, key) / RECORD).exists()

    def records(self) -> list[Record]:
        """All records, the newest first."""
        found = []
        for path in (self.root / "records").glob("*.json"):
            with contextlib.suppress(FileNotFoundError, DamagedError):
                found.append(Record.unsealed(path.read_bytes()))
        return sorted(found, key=lambda record: str(record.data["finished"]), reverse=True)

    def has_artifact(self, record: Record, *, reread: bool = False) -> bool:
        """Whether the artifact is here and unchanged: by sizes and times of its files; with `reread` by their bytes, and
        nothing else may lie among them.
        """
        folder = self.folder(record.kind, record.key)
        if reread:
            return folder.is_dir() and not [damage for damage in damages(folder, record) if damage.matters]
        try:
            return all(self.digests.of(folder / name) == wanted for name, wanted in record.used.items())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def set_aside(self, stage: Stage | str, key: str) -> Path | None:
        """Moves an artifact (forced or damaged) out of use; returns where it went. Its record stays."""
        folder = self.folder(stage, key)
        if not folder.exists():
            return None
        return self.move_aside(folder)

    def move_aside(self, path: Path) -> Path:
        """Moves a file or folder of the cache out of use; returns where it went."""
        self._leases.confirm(path.name)
        place = self.root / "aside" / f"{path.name}-{time.time_ns()}"
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
        return place

    def discard_work(self, stage: Stage | str, key: str) -> None:
        """Removes what an interrupted run left of an artifact."""
        self._leases.confirm(_name(stage, key))
        shutil.rmtree(self.work(stage, key), ignore_errors=True)
        self._leases.forget_work(_name(stage, key))

    def forget(self, key: str) -> None:
        """Removes a record, so that its stage runs again."""
        self.record_path(key).unlink(missing_ok=True)

    def remember(self, record: Record) -> None:
        """Keeps the record of an artifact that is elsewhere."""
        write_whole(self.record_path(record.key), record.sealed)

    def finish(self, stage: Stage, key: str, facts: Mapping[str, Any]) -> Record:
        """Turns the work folder into the finished artifact: digests, record, fsync, one rename. Returns the record."""
        made = stage.makes(self.work(stage, key))
        files, attachments = made.digests(), made.digests_of(made.attachments())
        known = {"kind": stage.kind, "key": key, "digest": digest_of(files), "files": files, "attachments": attachments}
        record = Record({**known, **facts})
        self.adopt(made.folder, record)
        return record

    def adopt(self, made: Path, record: Record) -> None:
        """Makes the folder `made`, whose files are those of `record`, the finished artifact."""
        folder = self.folder(record.kind, record.key)
        (made / RECORD).write_bytes(record.sealed)
        named = [*record.files, *record.attachments, RECORD]
        written = [path for path in map(made.joinpath, named) if path.exists()]  # metrics may be lost
        for path in [*written, *{path.parent for path in written}]:
            fsync(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._leases.confirm(record.name)  # after this, who takes the key over first takes `made` away
        self.set_aside(record.kind, record.key)  # one that no longer matched its record
        made.rename(folder)
        fsync(folder.parent)
        self._leases.forget_work(record.name)
        self.remember(record)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)

    def record_path(self, key: str) -> Path:
        """Where the record of a key is kept beyond its artifact."""
        return self.root / "records" / f"{key}.json"

    @contextlib.contextmanager
    def lock(self, stage: Stage | str, key: str, *, waiting: "Waiting") -> Iterator[IO[bytes]]:
        """Holds the key's lock alone; yields its file, which workers inherit as their output, so that the lock is free exactly
        when nobody works under it any more. Waits while another holds it, telling `waiting`.

        LeaseLostError, whatever else went wrong inside, if another machine took the key over meanwhile.
        """
        name = _name(stage, key)
        with self.open_log(stage, key) as file:
            self._wait(lambda: self._flock(file, name, fcntl.LOCK_EX), waiting)
            self._wait(lambda: self._leases.try_alone(name), waiting)
            try:
                yield file
            except (StageError, OSError):
                self._leases.raise_if_lost(name, look=True)
                raise
            finally:
                self._leases.release(name)

    def confirm(self, stage: Stage | str, key: str) -> None:
        """LeaseLostError if the key's lock was held alone and is another machine's by now, asked right before a deed."""
        self._leases.confirm(_name(stage, key))

    def raise_if_lost(self, stage: Stage | str, key: str) -> None:
        """LeaseLostError if the key's lock was held alone and is another machine's by now."""
        self._leases.raise_if_lost(_name(stage, key))

    @contextlib.contextmanager
    def reading(self, records: Iterable[Record], *, waiting: "Waiting") -> Iterator[None]:
        """Holds the locks of artifacts together with others who read them, so that nobody removes them meanwhile."""
        with contextlib.ExitStack() as held:
            for record in records:
                file, name = held.enter_context(self.open_log(record.kind, record.key)), record.name
                self._wait(partial(self._flock, file, name, fcntl.LOCK_SH), waiting)
                lease = self._wait(partial(self._leases.try_reading, name), waiting)
                held.callback(lease.release)
            yield

    @contextlib.contextmanager
    def lock_if_free(self, kind: str, key: str) -> Iterator[bool]:
        """Holds the key's lock alone if nobody works under it or reads its artifact; yields whether that is so."""
        name = _name(kind, key)
        with self.open_log(kind, key) as file:
            free = _locked(file, fcntl.LOCK_EX) and self._leases.is_free(name)
            if not (free and isinstance(self._leases.try_alone(name), Lease)):
                yield False
                return
            try:
                yield True
            finally:
                self._leases.release(name)

    def is_free(self, kind: str, key: str) -> bool:
        """Whether nobody holds the key's lock now; leaves no trace, and may take seconds where other machines work here."""
        return not self.is_held_here(kind, key) and self._leases.is_free(_name(kind, key))

    def is_held_here(self, kind: str, key: str) -> bool:
        """Whether a process of this machine holds the key's lock now; leaves no trace."""
        with contextlib.suppress(OSError), self.log(kind, key).open("rb") as file:
            return not _locked(file, fcntl.LOCK_EX)
        return False

    def _flock(self, file: IO[bytes], name: str, mode: int) -> bool | str:
        """Takes the key's lock of this machine; else says who is in the way."""
        return _locked(file, mode) or self._leases.holder_of(name) or UNKNOWN

    def _wait(self, attempt: Callable[[], T | str], waiting: "Waiting") -> T:
        """What `attempt` gives once it no longer says who is in the way."""
        looks, told = 0, False
        while isinstance(found := self._writable(attempt), str):
            looks += 1
            if not told and (found != UNKNOWN or looks > UNKNOWN_LOOKS):
                waiting.started(found)
                told = True
            waiting.tick()
            time.sleep(0.1)
        return found

    def open_log(self, stage: Stage | str, key: str) -> IO[bytes]:
        """The log of a key on this machine, to be appended to; its lock is not held."""

        def opened() -> IO[bytes]:
            path = self.log(stage, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("ab")

        return self._writable(opened)

    def _writable(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            raise NotWritableError(
                f"{self.root}: the cache cannot be written ({error.strerror}), and there is work to do; make it writable, or "
                "name another with --cache or STOCKPOT_CACHE"
            ) from error


class Waiting:
    """Told about waiting for a lock; the default waits in silence."""

    def started(self, holder: str) -> None:
        """Another process holds the lock; called once."""

    def tick(self) -> None:
        """Called several times a second while waiting; raise to give up."""


def _locked(file: IO[bytes], mode: int) -> bool:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def default_cache(recipe: Path, asked: Path | None) -> Path:
    """`--cache`, else STOCKPOT_CACHE, else cache/ beside the nearest pyproject.toml above the recipe, else ./cache."""
    if asked:
        return asked
    if os.environ.get("STOCKPOT_CACHE"):
        return Path(os.environ["STOCKPOT_CACHE"])
    for folder in recipe.resolve().parents:
        if (folder / "pyproject.toml").exists():
            return folder / "cache"
    return Path("cache")


def _name(stage: Stage | str, key: str) -> str:
    return f"{stage if isinstance(stage, str) else stage.kind}-{key}"

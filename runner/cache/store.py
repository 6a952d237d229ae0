"""The cache folder: finished artifacts, work in progress, records and locks. A stage is finished if and only if its folder is
under `stages/`.

    cache/
      stages/<kind>-<key>/    finished artifacts, each with its record.json
      work/<kind>-<key>/      an unfinished artifact; after a crash the same key resumes in it
      records/<key>.json      a copy of each record, kept when the artifact is removed
      records.index           what planning compares new stages with, from all records
      origins/<key>.json      where a record came from that was not made here
      logs/<kind>-<key>.<machine>.log    output of the workers; the file is also the key's lock on that machine
      leases/<kind>-<key>/    which machine holds the key; holders/ has the heartbeats
      arriving/               downloads from a remote
      aside/                  artifacts that were forced or damaged
      runs/                   the keys that each of the last runs used
      receipts/               what was pushed where
      published/              recipes of published models and their data
      digests.json            memo of file digests by path, size, times and inode

The lock of a key is exclusive for making, fetching or removing its artifact, and shared for reading it. It has two parts: a
`flock` between the processes of a machine, and a lease between machines (`runner.cache.leases`).
"""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from runner.artifacts import RECORD, SCRATCH
from runner.cache.digests import DigestMemo
from runner.cache.heartbeat import this_machine
from runner.cache.integrity import mismatches
from runner.cache.leases import UNKNOWN, Lease, Leases
from runner.cache.origins import Origins
from runner.cache.record import DamagedRecordError, Record, digest_of
from runner.cache.record_index import indexed_facts
from runner.errors import StageError
from runner.file_locks import EXCLUSIVE, SHARED, is_locked, open_lock, take_lock
from runner.files import fsync, write_whole
from runner.stage import Stage

T = TypeVar("T")

UNKNOWN_LOOKS = 5  # at a lock whose holder is not known yet, before the wait is reported
LARGEST_LOG = 16 * 2**20  # bytes of a log, which begins anew when a stage begins with a longer one
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class NotWritableError(StageError):
    """The cache is read-only, and a stage has to run."""


class Store:
    """One cache folder. Nothing is written before the first stage runs, except the memo of digests."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.digests = DigestMemo(self.root / "digests.json")
        self.origins = Origins(self.root)
        self._leases = Leases(self.root)

    def folder(self, stage: Stage | str, key: str) -> Path:
        """The folder of the finished artifact."""
        return self.root / "stages" / _name(stage, key)

    def work(self, stage: Stage | str, key: str) -> Path:
        """The folder of the unfinished artifact; a new one after another machine took the key over."""
        return self.root / "work" / self._leases.work_name(_name(stage, key))

    def is_work(self, folder: Path, name: str) -> bool:
        """Whether a folder in work/ is the current one of the artifact <kind>-<key>."""
        return folder.name == self._leases.work_name(name)

    def log(self, stage: Stage | str, key: str) -> Path:
        """The output of the workers on this machine."""
        return self.root / "logs" / f"{_name(stage, key)}{_log_ending()}"

    def is_own_log(self, path: Path) -> bool:
        """Whether a file in logs/ is of this machine."""
        return path.name.endswith(_log_ending())

    def remove_lease(self, stage: Stage | str, key: str) -> None:
        """Removes what is kept for leases of a key, whose exclusive lock is held."""
        self._leases.remove(_name(stage, key))

    def record(self, stage: Stage | str, key: str) -> Record | None:
        """The record of a key, whether or not its artifact is here; None if it is missing or damaged, or came from a place
        that the user did not name.
        """
        record = self.stored_record(stage, key)
        return record if record and self.origins.counts(self.origins.of(record)) else None

    def stored_record(self, stage: Stage | str, key: str) -> Record | None:
        """The record of a key from wherever it came; None if it is missing or damaged."""
        for path in (self.folder(stage, key) / RECORD, self.record_path(key)):
            with contextlib.suppress(OSError, DamagedRecordError):
                record = Record.read(path)
                if record.name == _name(stage, key):
                    return record
        return None

    def has_damaged_record(self, stage: Stage | str, key: str) -> bool:
        """Whether a key without a valid record has a record file."""
        if self.stored_record(stage, key) is not None:
            return False
        return self.record_path(key).exists() or (self.folder(stage, key) / RECORD).exists()

    def records(self, kinds: Collection[str]) -> list[Record]:
        """The records of some kinds that count, newest first, with what planning compares and estimates from alone
        (`runner.cache.record_index`).
        """
        foreign = self.origins.noted()
        found = [
            Record(facts)
            for facts in indexed_facts(self.root, kinds)
            if facts["key"] not in foreign or self.record(facts["kind"], facts["key"])
        ]
        return sorted(found, key=lambda record: str(record.data["finished"]), reverse=True)

    def has_artifact(self, record: Record, *, reread: bool = False) -> bool:
        """Whether the artifact is here and unchanged, by the sizes and times of its files; with `reread` by their bytes, and
        without any other file.
        """
        folder = self.folder(record.kind, record.key)
        if reread:
            return folder.is_dir() and not [mismatch for mismatch in mismatches(folder, record) if mismatch.invalidates]
        try:
            return all(self.digests.of(folder / name) == digest for name, digest in record.used.items())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def set_aside(self, stage: Stage | str, key: str) -> Path | None:
        """Moves a forced or damaged artifact to aside/; returns its new place. Its record stays."""
        folder = self.folder(stage, key)
        return self.move_aside(folder) if folder.exists() else None

    def move_aside(self, path: Path) -> Path:
        """Moves a file or folder of the cache to aside/; returns its new place."""
        self._leases.confirm(path.name)
        place = self.root / "aside" / f"{path.name}-{time.time_ns()}"
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
        return place

    def discard_work(self, stage: Stage | str, key: str) -> None:
        """Removes an unfinished artifact."""
        self._leases.confirm(_name(stage, key))
        shutil.rmtree(self.work(stage, key), ignore_errors=True)
        self._leases.forget_work(_name(stage, key))

    def forget(self, key: str) -> None:
        """Removes a record, so that its stage runs again."""
        self.record_path(key).unlink(missing_ok=True)

    def remember(self, record: Record, *, origin: str | None) -> None:
        """Keeps the record of an artifact that may not be here; `origin` is the remote that it came from, None if it was made
        here.
        """
        self.origins.note(record, origin)
        write_whole(self.record_path(record.key), record.sealed)

    def finish(self, stage: Stage, key: str, facts: Mapping[str, Any]) -> Record:
        """Turns the work folder into the finished artifact: digests, record, fsync, one rename. Returns the record."""
        made = stage.makes(self.work(stage, key))
        files, attachments = made.digests(), made.digests_of(made.attachments())
        known = {"kind": stage.kind, "key": key, "digest": digest_of(files), "files": files, "attachments": attachments}
        sizes = {name: (made.folder / name).stat().st_size for name in files | attachments}
        record = Record({**known, "sizes": sizes, **facts})
        self.adopt(made.folder, record, origin=None)
        return record

    def adopt(self, made: Path, record: Record, *, origin: str | None) -> None:
        """Makes the folder `made`, whose files are those of `record`, the finished artifact."""
        self.origins.note(record, origin)
        folder = self.folder(record.kind, record.key)
        (made / RECORD).write_bytes(record.sealed)
        named = [*record.files, *record.attachments, RECORD]
        written = [path for path in map(made.joinpath, named) if path.exists()]  # metrics may be missing
        for path in [*written, *{path.parent for path in written}]:
            fsync(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._leases.confirm(record.name)  # a machine that takes the key over after this moves `made` away first
        self.set_aside(record.kind, record.key)  # one that no longer matched its record
        made.rename(folder)
        fsync(folder.parent)
        self._leases.forget_work(record.name)
        self.remember(record, origin=origin)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)

    def record_path(self, key: str) -> Path:
        """The copy of the record of a key."""
        return self.root / "records" / f"{key}.json"

    @contextlib.contextmanager
    def lock(self, stage: Stage | str, key: str, *, waiting: "Waiting") -> Iterator[IO[bytes]]:
        """Holds the key's exclusive lock; yields its file, which workers inherit as their output, so that the lock is free
        only when all of them have ended. Waits while another process holds it.

        LeaseLostError, instead of any other error inside, if another machine took the key over meanwhile.
        """
        name = _name(stage, key)
        with self._wait(lambda: self._locked_log(stage, key, EXCLUSIVE), waiting) as file:
            self._wait(lambda: self._leases.try_alone(name), waiting)
            if os.fstat(file.fileno()).st_size > LARGEST_LOG:
                file.truncate(0)
            try:
                yield file
            except (StageError, OSError):
                self._leases.raise_if_lost(name, look=True)
                raise
            finally:
                self._leases.release(name)

    def confirm(self, stage: Stage | str, key: str) -> None:
        """LeaseLostError if another machine took over the exclusive lock; reads the disk, for use before a permanent
        change."""
        self._leases.confirm(_name(stage, key))

    def raise_if_lost(self, stage: Stage | str, key: str) -> None:
        """LeaseLostError if another machine is known to have taken over the exclusive lock."""
        self._leases.raise_if_lost(_name(stage, key))

    @contextlib.contextmanager
    def reading(self, records: Iterable[Record], *, waiting: "Waiting") -> Iterator[None]:
        """Holds the shared locks of artifacts, so that they are not removed meanwhile."""
        with contextlib.ExitStack() as held:
            for record in records:
                held.enter_context(self._wait(partial(self._locked_log, record.kind, record.key, SHARED), waiting))
                lease = self._wait(partial(self._leases.try_reading, record.name), waiting)
                held.callback(lease.release)
            yield

    @contextlib.contextmanager
    def lock_if_free(self, kind: str, key: str) -> Iterator[bool]:
        """Holds the key's exclusive lock if it is free; yields whether it was."""
        name = _name(kind, key)
        with contextlib.ExitStack() as held:
            if (log := self._writable(lambda: take_lock(self.log(kind, key), EXCLUSIVE))) is not None:
                held.enter_context(log)
            if not (log and self._leases.is_free(name) and isinstance(self._leases.try_alone(name), Lease)):
                yield False
                return
            try:
                yield True
            finally:
                self._leases.release(name)

    def is_free(self, kind: str, key: str) -> bool:
        """Whether the key's lock is free. Writes nothing; may take seconds where other machines share the cache."""
        return not self.is_held_here(kind, key) and self._leases.is_free(_name(kind, key))

    def is_held_here(self, kind: str, key: str) -> bool:
        """Whether a process of this machine holds the key's lock. Writes nothing."""
        return is_locked(self.log(kind, key))

    def _locked_log(self, stage: Stage | str, key: str, mode: int) -> IO[bytes] | str:
        """The log of a key with its lock on this machine; else who holds it."""
        file = take_lock(self.log(stage, key), mode)
        return file or self._leases.holder_of(_name(stage, key)) or UNKNOWN

    def _wait(self, attempt: Callable[[], T | str], waiting: "Waiting") -> T:
        """The first result of `attempt` that is not the name of a holder."""
        looks, reported = 0, False
        while isinstance(result := self._writable(attempt), str):
            looks += 1
            if not reported and (result != UNKNOWN or looks > UNKNOWN_LOOKS):
                waiting.started(result)
                reported = True
            waiting.tick()
            time.sleep(0.1)
        return result

    def open_log(self, stage: Stage | str, key: str) -> IO[bytes]:
        """The log of a key on this machine, opened for appending, without its lock."""
        return self._writable(lambda: open_lock(self.log(stage, key)))

    def _writable(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            raise NotWritableError(
                f"{self.root}: the cache cannot be written ({error.strerror}), and a stage has to run; make it writable, or "
                "choose another with --cache or STOCKPOT_CACHE"
            ) from error


class Waiting:
    """Callbacks while waiting for a lock; the defaults do nothing."""

    def started(self, holder: str) -> None:
        """Another process holds the lock; called once."""

    def tick(self) -> None:
        """Called several times a second while waiting; raise to give up."""


def _log_ending() -> str:
    return f".{re.sub(r'[^A-Za-z0-9_.-]', '_', this_machine().host)}.log"


def _name(stage: Stage | str, key: str) -> str:
    return f"{stage if isinstance(stage, str) else stage.kind}-{key}"

"""The cache folder: where finished artifacts, work in progress, records and locks lie. A stage is finished if and only if its
folder is under `stages/`.

    cache/
      stages/<kind>-<key>/    finished artifacts, each with its record.json
      work/<kind>-<key>/      an artifact that grows; a crash leaves it, and the same key goes on in it
      records/<key>.json      a copy of each record, which outlives the artifact
      logs/<kind>-<key>.log   what the workers printed; the file is also the lock of its key
      aside/                  artifacts that were forced or found damaged
      digests.json            memo of file digests by path, size, time and inode
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from runner.artifacts import RECORD, SCRATCH, digest_file
from runner.stage import InputFile, Stage

COMPRESSED = (".gz", ".zst")
FRESH_SECONDS = 0.1  # a file changed this recently may change again within one tick of its clock: its digest is not remembered


@dataclass(frozen=True)
class Record:
    """What is known of a finished stage: enough to plan without its artifact."""

    data: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The kind of stage."""
        return str(self.data["kind"])

    @property
    def key(self) -> str:
        """The key it was computed under."""
        return str(self.data["key"])

    @property
    def digest(self) -> str:
        """sha256 over the artifact's content."""
        return str(self.data["digest"])

    @property
    def files(self) -> Mapping[str, str]:
        """sha256 of each content file."""
        return dict(self.data["files"])

    def summary(self) -> dict[str, str]:
        """What the record of a later stage says of this one as its input."""
        return {"kind": self.kind, "key": self.key, "digest": self.digest}


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of an artifact: over the names and digests of its content files."""
    text = json.dumps(dict(files), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """One cache folder. Nothing is written before the first stage runs, except the memo of digests."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.digests = DigestMemo(self.root / "digests.json")

    def folder(self, stage: Stage | str, key: str) -> Path:
        """Where the finished artifact is."""
        return self.root / "stages" / _name(stage, key)

    def work(self, stage: Stage, key: str) -> Path:
        """Where the artifact grows."""
        return self.root / "work" / _name(stage, key)

    def log(self, stage: Stage, key: str) -> Path:
        """What the workers print."""
        return self.root / "logs" / f"{_name(stage, key)}.log"

    def record(self, stage: Stage | str, key: str) -> Record | None:
        """The record of a key, whether or not its artifact is still here."""
        for path in (self.record_path(key), self.folder(stage, key) / RECORD):
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                return Record(json.loads(path.read_text(encoding="utf-8")))
        return None

    def records(self) -> list[Record]:
        """All records, the newest first."""
        found = []
        for path in (self.root / "records").glob("*.json"):
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                found.append(Record(json.loads(path.read_text(encoding="utf-8"))))
        return sorted(found, key=lambda record: str(record.data["finished"]), reverse=True)

    def has_artifact(self, record: Record, *, reread: bool = False) -> bool:
        """Whether the artifact is here and unchanged: by sizes and times of its files, or by their bytes with `reread`."""
        folder = self.folder(record.kind, record.key)
        digest = digest_file if reread else self.digests.of
        try:
            return all(digest(folder / name) == wanted for name, wanted in record.files.items())
        except FileNotFoundError:
            return False

    def set_aside(self, stage: Stage | str, key: str) -> Path | None:
        """Moves an artifact (forced or damaged) out of use; returns where it went. Its record stays."""
        folder = self.folder(stage, key)
        if not folder.exists():
            return None
        place = self.root / "aside" / f"{folder.name}-{time.time_ns()}"
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)
        return place

    def discard_work(self, stage: Stage, key: str) -> None:
        """Removes what an interrupted run left of an artifact."""
        shutil.rmtree(self.work(stage, key), ignore_errors=True)

    def forget(self, key: str) -> None:
        """Removes a record, so that its stage runs again."""
        self.record_path(key).unlink(missing_ok=True)

    def finish(self, stage: Stage, key: str, facts: Mapping[str, Any]) -> Record:
        """Turns the work folder into the finished artifact: digests, record, fsync, one rename. Returns the record."""
        work, folder = self.work(stage, key), self.folder(stage, key)
        files = stage.makes(work).digests()
        data = {"kind": stage.kind, "key": key, "digest": digest_of(files), "files": files, **facts}
        (work / RECORD).write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
        written = [*map(work.joinpath, files), work / RECORD]
        for path in [*written, *{path.parent for path in written}]:
            _fsync(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():  # an artifact that no longer matched its record
            self.set_aside(stage, key)
        work.rename(folder)
        _fsync(folder.parent)
        write_whole(self.record_path(key), json.dumps(data, ensure_ascii=False))
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        return Record(data)

    def record_path(self, key: str) -> Path:
        """Where the record of a key is kept beyond its artifact."""
        return self.root / "records" / f"{key}.json"

    @contextlib.contextmanager
    def lock(self, stage: Stage, key: str, *, waiting: "Waiting") -> Iterator[IO[bytes]]:
        """Holds the key's lock; yields its file, which workers inherit as their output, so that the lock is free exactly when
        nobody works under it any more. Waits while another holds it, telling `waiting`.
        """
        path = self.log(stage, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            _acquire(file, path, waiting)
            yield file


class Waiting:
    """Told about waiting for a lock; the default waits in silence."""

    def started(self, holder: str) -> None:
        """Another process holds the lock; called once."""

    def tick(self) -> None:
        """Called several times a second while waiting; raise to give up."""


def _acquire(file: IO[bytes], path: Path, waiting: Waiting) -> None:
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                waiting.started(_holder(path))
                told = True
            waiting.tick()
            time.sleep(0.1)
        else:
            path.with_suffix(".holder").write_text(f"process {os.getpid()}", encoding="utf-8")
            return


def _holder(path: Path) -> str:
    try:
        return path.with_suffix(".holder").read_text(encoding="utf-8")
    except FileNotFoundError:
        return "another process"


class DigestMemo:
    """sha256 of files, remembered by (path, size, mtime_ns, inode) so that planning does not read them again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: dict[str, list[Any]] = {}

    @cached_property
    def _known(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        return known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """sha256 of a file; FileNotFoundError if it is not there."""
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        remembered = self._new.get(str(path)) or self._known.get(str(path))
        if remembered and remembered[:3] == stamp:
            return str(remembered[3])
        digest = digest_file(path)
        if time.time() - status.st_mtime > FRESH_SECONDS:
            self._new[str(path)] = [*stamp, digest]
        return digest

    def of_inputs(self, file: InputFile) -> list[list[str]]:
        """[format, digest] of each file that an input means now: what a stage's identity holds of it."""
        return [[_format(path), self.of(path)] for path in file.matches()]

    def save(self) -> None:
        """Writes what was learned; a cache that cannot be written only makes the next planning slower."""
        if not self._new:
            return
        merged = {**self._known, **self._new}
        del self._known
        with contextlib.suppress(OSError):
            write_whole(self._path, json.dumps({path: entry for path, entry in merged.items() if Path(path).exists()}))
        self._new = {}


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that readers see the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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


def _format(path: Path) -> str:
    """What decides how a file is read: its ending, the one before a compression's included."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    return "".join(endings if endings and endings[-1] in COMPRESSED else endings[-1:])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

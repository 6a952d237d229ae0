"""A remote cache: artifacts by key in a folder, a bucket or a Hub repository, through fsspec.

    <remote>/<kind>-<key>/<seal of the record>/<files>
    <remote>/records/<key>.json                          written last: only with it the artifact is complete

Downloads are verified before they enter the cache. Planning never asks a remote, and a run continues without one that does not
answer. fsspec is imported where a remote is first used.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from runner.artifacts import METRICS, RECORD, digest_file
from runner.cache.record import DamagedRecordError, Record, digest_of
from runner.cache.store import Store
from runner.credentials import redact
from runner.errors import RemoteError
from runner.files import DISK_FULL
from runner.graph import key_of

T = TypeVar("T")

PACKAGES = {"hf": "huggingface_hub", "s3": "s3fs", "memory": "fsspec", "file": "fsspec"}  # scheme -> package
ADDRESS_FORM = "s3://BUCKET/..., hf://OWNER/REPOSITORY/..., a folder, or memory://..."
ANSWER_SECONDS = 30.0  # until a remote counts as unreachable
SLOWEST = 200_000  # bytes per second; a slower remote counts as unreachable


class DamagedRemoteError(RemoteError):
    """An artifact in a remote differs from its record; its other artifacts may be intact."""


def is_local(address: str) -> bool:
    """Whether an address is a folder on this machine."""
    return "://" not in address or address.startswith("file://")


def local_folder(address: str) -> Path:
    """The folder of a local address."""
    return Path(address.removeprefix("file://"))


def address_fault(address: str) -> str | None:
    """What is wrong with the form of an address, else None."""
    scheme, separator, rest = address.partition("://")
    if "::" in address or (separator and scheme not in PACKAGES) or "\0" in address or not address.strip():
        return f"expected {ADDRESS_FORM}, got {redact(address)!r}"
    if "@" in rest.partition("/")[0]:
        return "expected an address without a user or password, since recipes are shared; put them in the environment"
    if separator and not rest and scheme != "memory":
        return f"expected {ADDRESS_FORM}, got {address!r}"
    return None


def open_remote(address: str, *, tick: Callable[[], None] = lambda: None) -> "Remote":
    """The remote at an address; RemoteError if the address is invalid or its package is not installed."""
    if fault := address_fault(address):
        raise RemoteError(f"remote: {fault}")
    if is_local(address):
        address = f"file://{local_folder(address).resolve()}"
    scheme, _, root = address.partition("://")
    package = PACKAGES[scheme]
    if find_spec(package) is None:
        raise RemoteError(f"remote {address}: expected the package {package}, got none; pip install {package}")
    import fsspec

    options: dict[str, Any] = {"auto_mkdir": True} if scheme == "file" else {}
    return Remote(fsspec.filesystem(scheme, **options), root.rstrip("/"), name=address, tick=tick)


class Remote:
    """A remote cache. Every call is bounded in time and fails with a RemoteError."""

    def __init__(
        self,
        files: Any,  # an fsspec file system
        root: str,
        *,
        name: str,
        seconds: float = ANSWER_SECONDS,
        tick: Callable[[], None] = lambda: None,  # called several times a second while waiting; raises to give up
    ) -> None:
        self._files, self._root, self.name, self._seconds, self._tick = files, root, name, seconds, tick

    def record(self, kind: str, key: str) -> Record | None:
        """The record of a complete artifact; None if there is none or it is invalid."""
        sealed = self._bounded(lambda: self._read(self._record_path(key)))
        if sealed is None:
            return None
        try:
            record = Record.unsealed(sealed)
            valid = record.name == f"{kind}-{key}" and key_of(record.data["identity"]) == key
            valid = valid and digest_of(record.files) == record.digest
            return record if valid and all(map(_is_inside, record.files | record.attachments)) else None
        except (DamagedRecordError, KeyError, TypeError, ValueError, AttributeError):
            return None

    def fetch(self, record: Record, store: Store) -> None:
        """Downloads an artifact, verifies it and moves it into the cache. The key's lock is held.

        DamagedRemoteError if a file differs from its record.
        """
        arriving = store.root / "arriving" / f"{record.name}-{os.getpid()}"
        shutil.rmtree(arriving, ignore_errors=True)
        try:
            for name, expected in (record.files | record.attachments).items():
                (arriving / name).parent.mkdir(parents=True, exist_ok=True)
                self._get(self._path(record, name), arriving / name, optional=name == METRICS)
                if name == METRICS and not (arriving / name).exists():
                    continue
                if (digest := digest_file(arriving / name)) != expected:
                    raise DamagedRemoteError(
                        f"{self.name}: {record.name}: {name}: expected sha256 {expected}, got sha256 {digest}"
                    )
            store.adopt(arriving, record)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)

    def offer(self, record: Record, folder: Path) -> bool:
        """Uploads an artifact and then its record; false if the remote already has the key."""
        if self.record(record.kind, record.key) is not None:
            return False
        present = {name: folder / name for name in record.files | record.attachments if (folder / name).exists()}
        size = sum(path.stat().st_size for path in present.values())
        uploads = {self._path(record, name): path for name, path in present.items()}
        self._bounded(lambda: self._upload(uploads, record), seconds=self._seconds + size / SLOWEST)
        return True

    def _upload(self, uploads: dict[str, Path], record: Record) -> None:
        if self.name.startswith("hf://") and self._commit(uploads, record):
            return
        for place, path in uploads.items():
            self._files.put_file(str(path), place)
        self._files.pipe_file(self._record_path(record.key), record.sealed)

    def _commit(self, uploads: dict[str, Path], record: Record) -> bool:
        """Uploads everything as one commit if the remote is a repository; else returns false."""
        from huggingface_hub import CommitOperationAdd, HfApi

        target = self._files.resolve_path(self._root)
        if not hasattr(target, "repo_id"):  # a bucket, which has no commits
            return False
        contents: dict[str, str | bytes] = {place: str(path) for place, path in uploads.items()}
        contents[self._record_path(record.key)] = record.sealed
        prefix = self._root.removesuffix(target.path_in_repo)
        api = HfApi(endpoint=self._files.endpoint, token=self._files.token)
        api.create_commit(
            target.repo_id,
            [CommitOperationAdd(place.removeprefix(prefix).lstrip("/"), content) for place, content in contents.items()],
            commit_message=f"{record.kind} {record.key[:12]}",
            repo_type=target.repo_type,
            revision=target.revision,
        )
        return True

    def _read(self, place: str) -> bytes | None:
        self._files.invalidate_cache()
        with suppress(FileNotFoundError, NotADirectoryError):
            return bytes(self._files.cat_file(place))
        return None

    def _get(self, place: str, path: Path, *, optional: bool) -> None:
        try:
            size = self._bounded(lambda: self._files.info(place)["size"]) or 0
            self._bounded(lambda: self._files.get_file(place, str(path)), seconds=self._seconds + size / SLOWEST)
        except RemoteError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            if not optional:
                raise DamagedRemoteError(f"{self.name}: {place}: expected a file, got none") from error

    def _path(self, record: Record, name: str) -> str:
        return f"{self._root}/{record.name}/{record.seal}/{name}"

    def _record_path(self, key: str) -> str:
        return f"{self._root}/records/{key}.json"

    def _bounded(self, work: Callable[[], T], *, seconds: float | None = None) -> T:
        """The result of `work`; RemoteError if it fails or takes longer. A hanging thread is abandoned."""
        done: list[T] = []
        failed: list[BaseException] = []

        def attempt() -> None:
            try:
                done.append(work())
            except BaseException as error:  # clients may raise anything
                failed.append(error)

        limit = seconds or self._seconds
        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        deadline = time.monotonic() + limit
        while thread.is_alive():
            thread.join(0.1)
            self._tick()
            if thread.is_alive() and time.monotonic() > deadline:
                raise RemoteError(f"{self.name}: no answer within {limit:.0f} s")
        if failed:
            error = failed[0]
            if isinstance(error, OSError) and error.errno in DISK_FULL and is_local(error.filename or ""):
                raise error
            raise RemoteError(redact(f"{self.name}: {' '.join(f'{type(error).__name__}: {error}'.split())}")) from error
        return done[0]


class Mirror:
    """A remote as a run uses it: asked once per key, and dropped after the first failure."""

    def __init__(self, address: str | None, *, note: Callable[[str], None], tick: Callable[[], None], upload: bool) -> None:
        self._address, self._note, self._tick, self._upload = address, note, tick, upload
        self._remote: Remote | None = None
        self._asked: set[str] = set()
        self._fetched: set[str] = set()

    def without(self, key: str) -> None:
        """Ignores the remote for this key."""
        self._asked.add(key)
        self._fetched.add(key)

    def record(self, kind: str, key: str) -> Record | None:
        """The remote's record of a key; None on every later call."""
        if key in self._asked:
            return None
        self._asked.add(key)
        with self._tolerantly() as remote:
            return remote.record(kind, key) if remote else None
        return None

    def has(self, record: Record) -> bool:
        """Whether the remote may have the artifact: there is a remote, and the artifact was not fetched before."""
        return self._address is not None and record.key not in self._fetched

    def fetch(self, store: Store, record: Record) -> bool:
        """Downloads the artifact of a record's key, whose lock is held; returns whether that succeeded."""
        self._fetched.add(record.key)
        with self._tolerantly() as remote:
            remote_record = remote.record(record.kind, record.key) if remote else None
            if remote and remote_record:
                remote.fetch(remote_record, store)
                return True
        return False

    def offer(self, record: Record, folder: Path) -> bool:
        """Uploads an artifact if uploads are on; returns whether it did."""
        with self._tolerantly() as remote:
            return bool(remote and self._upload and remote.offer(record, folder))
        return False

    @contextmanager
    def _tolerantly(self) -> Iterator[Remote | None]:
        if self._address and self._remote is None:
            self._remote = open_remote(self._address, tick=self._tick)
        try:
            yield self._remote
        except DamagedRemoteError as error:
            self._note(f"warning: {error}; it is made here instead")
        except RemoteError as error:
            self._note(f"warning: {error}; continuing without this remote")
            self._address = self._remote = None


def _is_inside(name: str) -> bool:
    """Whether a name of a remote record is a content file inside the artifact's folder."""
    parts = name.split("/")
    plain = not any(part == "" or part.startswith(".") for part in parts) and "\\" not in name and "\0" not in name
    return plain and name != RECORD and not PurePosixPath(name).is_absolute()

"""A remote cache: artifacts by key in a folder, a bucket or a Hub repository, through fsspec.

    <remote>/<kind>-<key>/<seal of the record>/<files>
    <remote>/records/<key>.json                          written last: only with it the artifact is complete

Only a remote that the user named is asked (`runner.cache.origins`). Downloads are verified before they enter the cache, and
what is known here by its digest is never replaced by something else. Planning never asks a remote, and a run continues without
one that does not answer. fsspec is imported where a remote is first used.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from runner.artifacts import METRICS, digest_file
from runner.cache.record import LARGEST, DamagedRecordError, Record
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
    """A record in a remote, or an artifact that differs from it, is damaged; its other artifacts may be intact."""


def is_local(address: str) -> bool:
    """Whether an address is a folder on this machine."""
    return "://" not in address or address.startswith("file://")


def local_folder(address: str) -> Path:
    """The folder of a local address."""
    return Path(address.removeprefix("file://"))


def full_address(address: str) -> str:
    """An address as it is noted in a cache: folders with their whole path."""
    return f"file://{local_folder(address).resolve()}" if is_local(address) else address.rstrip("/")


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
    address = full_address(address)
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
        """The record of a complete artifact; None if there is none. DamagedRemoteError if it is not the record of this key."""
        sealed = self._bounded(lambda: self._read(self._record_path(key)))
        if sealed is None:
            return None
        place = f"{self.name}: records/{key}.json"
        try:
            record = Record.unsealed(sealed)
        except DamagedRecordError as error:
            raise DamagedRemoteError(f"{place}: {error}") from error
        if record.name != f"{kind}-{key}" or key_of(record.data["identity"]) != key:
            raise DamagedRemoteError(f"{place}: expected the record of this key, got that of another")
        return record

    def fetch(self, record: Record, store: Store, *, known: Record | None = None) -> None:
        """Downloads the artifact of this remote's `record`, verifies it and moves it into the cache. The key's lock is held.
        If the artifact is `known` here by another record, that one stays and decides.

        DamagedRemoteError if a file differs from the record.
        """
        wanted = record if known is None else known
        if record.digest != wanted.digest:
            raise DamagedRemoteError(
                f"{self.name}: {record.name}: expected the content that is known here, {wanted.digest[:12]}, got "
                f"{record.digest[:12]}"
            )
        files = wanted.files | wanted.attachments
        origin = self.name if known is None else store.origins.of(known)
        arriving = store.root / "arriving" / f"{record.name}-{os.getpid()}"
        shutil.rmtree(arriving, ignore_errors=True)
        try:
            sizes = self._sizes(record, files)
            arriving.mkdir(parents=True)
            if sum(sizes.values()) > (free := shutil.disk_usage(arriving).free):
                raise RemoteError(f"{self.name}: {record.name}: needs {sum(sizes.values()):,} bytes, and {free:,} are free")
            for name, size in sizes.items():
                self._download(self._path(record, name), arriving / name, size, files[name])
            store.adopt(arriving, wanted, origin=origin)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)

    def _sizes(self, record: Record, names: Iterable[str]) -> dict[str, int]:
        """The bytes of each file of an artifact that the remote has; DamagedRemoteError if one is missing."""
        recorded, found = record.data.get("sizes") or {}, dict[str, int]()
        for name in names:
            place = self._path(record, name)
            about = self._bounded(partial(self._about, place))
            if about is None and name == METRICS:
                continue
            if about is None:
                raise DamagedRemoteError(f"{self.name}: {place}: expected a file, got none")
            if about != recorded.get(name, about):
                raise DamagedRemoteError(f"{self.name}: {place}: expected {recorded[name]:,} bytes, got {about:,}")
            found[name] = about
        return found

    def _download(self, place: str, path: Path, size: int, expected: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._bounded(lambda: self._files.get_file(place, str(path)), seconds=self._seconds + size / SLOWEST)
        except RemoteError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise DamagedRemoteError(f"{self.name}: {place}: expected a file, got none") from error
        if (digest := digest_file(path)) != expected:
            raise DamagedRemoteError(f"{self.name}: {place}: expected sha256 {expected}, got sha256 {digest}")

    def offer(self, record: Record, folder: Path, *, replace: bool = False) -> bool:
        """Uploads an artifact and then its record; false if the remote already has the key. What is damaged there is replaced,
        and with `replace` whatever is there.
        """
        present = {name: folder / name for name in record.files | record.attachments if (folder / name).exists()}
        sizes = {name: path.stat().st_size for name, path in present.items()}
        if not replace and self._has(record, sizes):
            return False
        uploads = {self._path(record, name): path for name, path in present.items()}
        seconds = self._seconds + sum(sizes.values()) / SLOWEST
        self._bounded(lambda: self._upload(uploads, record), seconds=seconds)
        return True

    def _has(self, record: Record, sizes: Mapping[str, int]) -> bool:
        """Whether the remote has a complete artifact of a key, as far as sizes tell."""
        try:
            there = self.record(record.kind, record.key)
            if there is None:
                return False
            found = self._sizes(there, there.files | there.attachments)
        except DamagedRemoteError:
            return False
        own = record.files | record.attachments
        same = [name for name, digest in there.files.items() if own.get(name) == digest and name in sizes]
        return all(found.get(name) == sizes[name] for name in same)

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
        """The bytes of a record, of which no more is read than a record may have."""
        self._files.invalidate_cache()
        if self._about(place) is None:
            return None
        with suppress(FileNotFoundError, NotADirectoryError):
            return bytes(self._files.cat_file(place, start=0, end=LARGEST + 1))
        return None

    def _about(self, place: str) -> int | None:
        """The bytes of a file; None if there is none, or something else, such as a device, which might have no end."""
        try:
            about = self._files.info(place)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return int(about["size"] or 0) if about["type"] == "file" else None

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
    """A remote that the user named, as a run uses it: asked once per key, and dropped after the first failure."""

    def __init__(self, address: str | None, *, note: Callable[[str], None], tick: Callable[[], None], upload: bool) -> None:
        self._address, self._note, self._tick, self._upload = address, note, tick, upload
        self._remote: Remote | None = None
        self._asked: set[str] = set()
        self._fetched: set[str] = set()
        self._damaged: set[str] = set()  # keys, which are replaced by what is made here

    def without(self, key: str) -> None:
        """Ignores the remote for this key."""
        self._asked.add(key)
        self._fetched.add(key)

    def look_up(self, store: Store, kind: str, key: str) -> Record | None:
        """The remote's record of a key, which the cache then has too; None on every later call."""
        if key in self._asked:
            return None
        self._asked.add(key)
        with self._tolerantly(key) as remote:
            if remote and (record := remote.record(kind, key)):
                store.origins.named.add(remote.name)
                store.remember(record, origin=remote.name)
                return record
        return None

    def has(self, record: Record) -> bool:
        """Whether the remote may have the artifact: there is a remote, and the artifact was not fetched before."""
        return self._address is not None and record.key not in self._fetched

    def fetch(self, store: Store, record: Record) -> bool:
        """Downloads the artifact of a record of the cache, whose key's lock is held; returns whether that succeeded."""
        self._fetched.add(record.key)
        with self._tolerantly(record.key) as remote:
            remote_record = remote.record(record.kind, record.key) if remote else None
            if remote and remote_record:
                store.origins.named.add(remote.name)
                remote.fetch(remote_record, store, known=record)
                return True
        return False

    def offer(self, record: Record, folder: Path) -> bool:
        """Uploads an artifact if uploads are on; returns whether it did."""
        with self._tolerantly(record.key) as remote:
            return bool(remote and self._upload and remote.offer(record, folder, replace=record.key in self._damaged))
        return False

    @contextmanager
    def _tolerantly(self, key: str) -> Iterator[Remote | None]:
        if self._address and self._remote is None:
            self._remote = open_remote(self._address, tick=self._tick)
        try:
            yield self._remote
        except DamagedRemoteError as error:
            self._damaged.add(key)
            self._note(f"warning: {error}; it is made here instead" + (", and replaced there" if self._upload else ""))
        except RemoteError as error:
            self._note(f"warning: {error}; continuing without this remote")
            self._address = self._remote = None

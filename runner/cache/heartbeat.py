"""Heartbeats between machines that share a disk: a process raises a counter in a file, and others watch whether it changes."""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

BEAT_SECONDS = 1.0  # between two beats
DEAD_SECONDS = 10.0  # without a beat, on the watcher's clock
LOOK_SECONDS = 1.0  # counted at most per look: a watcher that was suspended has not watched
OLD_SECONDS = 24 * 3600.0  # from the last beat until the file is removed


@dataclass(frozen=True)
class Identity:
    """A process on a machine."""

    host: str
    machine: str  # unique to this machine and this boot
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@cache
def this_machine() -> Identity:
    """This process; STOCKPOT_MACHINE names a machine whose host name is not unique."""
    if name := os.environ.get("STOCKPOT_MACHINE"):
        return Identity(name, name, os.getpid())
    host = os.uname().nodename
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = f"{uuid.getnode():x}"
    return Identity(host, f"{host} {boot}", os.getpid())


class Holder:
    """This process as the holder of leases: while it has any, it beats, and calls each lease's `look` at every beat."""

    def __init__(self, folder: Path) -> None:
        self.id = uuid.uuid4().hex
        self.lock = threading.RLock()  # between the heartbeat thread and the one that takes and releases leases
        self._path = folder / self.id
        self._facts = json.dumps(asdict(this_machine()))
        self._leases: dict[str, Callable[[], None]] = {}
        self._numbers = self._counter = 0
        self._stopping: threading.Event | None = None

    def new_lease(self) -> str:
        """A name for a lease; the heartbeat is visible to others before this returns."""
        with self.lock:
            self._numbers += 1
            if self._stopping is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._beat()
                self._sweep()
            return f"{self.id}.{self._numbers}"

    def add(self, lease: str, look: Callable[[], None]) -> None:
        """Beats for a lease, and calls `look` each time."""
        with self.lock:
            self._leases[lease] = look
            if self._stopping is None:
                self._stopping = threading.Event()
                threading.Thread(target=self._keep_beating, args=[self._stopping], daemon=True, name="heartbeat").start()

    def remove(self, lease: str) -> None:
        """Ends the beats for a lease; after the last one the heartbeat stops."""
        with self.lock:
            self._leases.pop(lease, None)
            if not self._leases and self._stopping is not None:
                self._stopping.set()
                self._stopping = None
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)

    def _keep_beating(self, stopping: threading.Event) -> None:
        while not stopping.wait(BEAT_SECONDS):
            with self.lock:
                if stopping.is_set():
                    return
                with contextlib.suppress(OSError):  # a temporary fault of the file system
                    self._beat()
                for look in list(self._leases.values()):
                    look()

    def _beat(self) -> None:
        """Raises the counter in place, which works on a full disk too."""
        self._counter += 1
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, f"{self._counter:020d}\n{self._facts}\n".encode(), 0)
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Removes the files of holders that died long ago, by the file system's clock alone."""
        with contextlib.suppress(OSError):
            now = self._path.stat().st_mtime
            for path in self._path.parent.iterdir():
                with contextlib.suppress(OSError):
                    if now - path.stat().st_mtime > OLD_SECONDS:
                        path.unlink()


class Watch:
    """Tells which holders are alive, by watching their counters."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, _Seen] = {}
        self._looked = time.monotonic()

    def is_dead(self, holder: str) -> bool:
        """Whether a holder was silent for DEAD_SECONDS over all looks so far. A missing file is silent, too."""
        self._look(holder)
        return self._seen[holder].silent >= DEAD_SECONDS

    def beats(self, holder: str) -> int:
        """How many beats of a holder were seen over all looks so far."""
        return self._seen[holder].beats if holder in self._seen else 0

    def identity(self, holder: str) -> Identity | None:
        """Who a holder is; None if its file cannot be read."""
        try:
            return Identity(**json.loads(self._content(holder).split(b"\n")[1]))
        except (ValueError, TypeError, IndexError):
            return None

    def _look(self, holder: str) -> None:
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, LOOK_SECONDS), now
        for name, seen in self._seen.items():
            content = self._content(name)
            if content == seen.content:
                seen.silent += passed
            else:
                seen.content, seen.silent, seen.beats = content, 0.0, seen.beats + 1
        self._seen.setdefault(holder, _Seen(self._content(holder)))

    def _content(self, holder: str) -> bytes:
        with contextlib.suppress(OSError):
            return (self._folder / holder).read_bytes()
        return b""


@dataclass
class _Seen:
    """The last state of a holder."""

    content: bytes
    silent: float = 0.0  # seconds
    beats: int = 0

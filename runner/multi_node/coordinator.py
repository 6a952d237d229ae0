"""The machine of rank 0: accepts the other machines, agrees with them on each training, and detects when one fails or leaves.

The others are `runner.multi_node.participant`. Both only exchange messages; the training itself runs between the processes of
`accelerate launch`.
"""

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.cache.heartbeat import this_machine
from runner.errors import MachineLostError, PeerFailedError, RecipeError, StageError, StockpotError
from runner.execution.node_layout import Layout
from runner.execution.stop import StopRequest
from runner.multi_node.connection import Connection, ConnectionClosed, ForeignError
from runner.multi_node.messages import Message

JOIN_SECONDS = 600.0  # for all machines to connect; a job queue may start them at different times
REPLACE_SECONDS = 5.0  # without a heartbeat; then a new machine of the same rank replaces it
REPORT_SECONDS = 5.0  # after a training failed here, for the others to report their cause
INTERRUPTED = 130
HELLO_SECONDS = 60.0  # for a machine that has connected to introduce itself
GREETINGS = 32  # connections that may be doing so
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class Peer:
    """Another machine."""

    rank: int
    who: str  # process and host
    shares: bool  # whether it sees the cache of this machine
    remote: str | None  # of its own cache
    connection: Connection
    ready: int = 0  # the last attempt it is ready for
    fault: PeerFailedError | None = None  # in the last attempt

    def __str__(self) -> str:
        return f"machine {self.rank} ({self.who})"


class Coordinator:
    """Implements `runner.execution.peers.Peers` on the machine of rank 0."""

    def __init__(
        self,
        layout: Layout,
        cache: Path,
        *,
        remote: str | None,  # from which the others can fetch artifacts
        secret: bytes,  # that all machines of the run know
        note: Callable[[str], None],
        stop: StopRequest,
        rejoin_seconds: float,
    ) -> None:
        self.layout, self._remote, self._note, self._stop = layout, remote, note, stop
        self._rejoin_seconds, self._secret = rejoin_seconds, secret
        self._greeting = threading.BoundedSemaphore(GREETINGS)
        self._told_of_strangers = False
        self._token = cache / "machines" / uuid.uuid4().hex
        self._peers: dict[int, Peer] = {}
        self._seen: set[int] = set()  # ranks that were connected before
        self._lost: list[str] = []  # machines replaced by another of the same rank, for the next check
        self._given_up = False
        self._guard = threading.Lock()
        self._refused: str | None = None
        self._attempt = 0
        self._listener: socket.socket | None = None

    @property
    def shares_cache(self) -> bool:
        """Whether all machines see the cache of this one."""
        return all(peer.shares for peer in self._peers.values())

    def open(self) -> None:
        """Starts to listen for the other machines."""
        self._token.parent.mkdir(parents=True, exist_ok=True)
        self._token.write_text(str(this_machine()), encoding="utf-8")
        host = self.layout.host if self.layout.host in LOOPBACK else ""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, self.layout.port), family=family)
        except OSError as error:
            raise StageError(
                f"port {self.layout.port} of this machine: expected a free port, got {error.strerror}; choose another one on "
                "every machine with --main-address HOST:PORT"
            ) from error
        threading.Thread(target=self._let_in, args=[self._listener], daemon=True, name="listener").start()

    @property
    def is_broken(self) -> bool:
        """Whether a machine was given up and is still missing."""
        return self._given_up and bool(self._missing())

    def give_up(self) -> None:
        """Continues without the missing machines; any that are back at the next training take part."""
        self._given_up = True

    def assemble(self) -> None:
        """Waits until all machines are connected; MachineLostError if one that was here does not come back."""
        noted, started = "", time.monotonic()
        while missing := self._missing():
            was_here = self._seen.issuperset(missing)
            seconds = self._rejoin_seconds if was_here else JOIN_SECONDS
            listed = ", ".join(map(str, missing))
            if listed != noted:
                self._note(
                    f"waiting for machine {listed} of {self.layout.machines} at port {self.layout.port}; run the same recipe "
                    "there with its --machine-rank"
                )
                noted = listed
            if time.monotonic() - started > seconds:
                kind, came = (MachineLostError, "come back") if was_here else (StageError, "come")
                raise kind(f"machine {listed} of {self.layout.machines} did not {came} within {seconds:.0f} s")
            self._stop.raise_if_requested()
            time.sleep(0.1)
        self._given_up = False

    def begin(self, stage: str, announcement: Mapping[str, Any]) -> None:
        """Announces a training; returns when all machines are ready and may start it."""
        self._attempt += 1
        self._lost.clear()
        for peer in self._all():
            peer.fault = None
            peer.connection.send(do="train", attempt=self._attempt, stage=stage, **announcement)
        while [peer for peer in self._all() if peer.ready != self._attempt]:
            self._stop.raise_if_requested()
            self.check()
            time.sleep(0.05)
        for peer in self._all():
            peer.connection.send(do="go", attempt=self._attempt)

    def check(self) -> None:
        """Raises what happened on another machine (MachineLostError, PeerFailedError, RecipeError) and passes on a stop."""
        for peer in [] if self._stop.requested else self._all():
            try:
                while message := peer.connection.receive():
                    self._handle(peer, message)
            except ConnectionClosed:
                with self._guard:
                    self._peers.pop(peer.rank, None)
                raise MachineLostError(f"{peer} is gone; checkpoints are kept") from None
        if self._lost:
            raise MachineLostError(f"{self._lost.pop()} is gone; checkpoints are kept")
        for peer in self._all():
            fault, peer.fault = peer.fault, None
            if fault is not None:
                raise fault

    def causes(self) -> list[str]:
        """What the others report within a few seconds after a training failed here; raises what ends it for good."""
        deadline = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < deadline:
            try:
                self.check()
            except PeerFailedError as fault:
                if not fault.again:
                    raise
                return [str(fault)]
            except MachineLostError as lost:
                return [str(lost)]
            time.sleep(0.1)
        return []

    def notify(self, text: str) -> None:
        """Sends a message for the users of the other machines."""
        for peer in self._all():
            peer.connection.send(do="note", text=text)

    def close(self, code: int, message: str) -> None:
        """Tells the other machines how the run ended."""
        with self._guard:
            if self._listener is not None:
                self._listener.close()
                self._listener = None
        for peer in self._all():
            peer.connection.send(do="over", code=code, message=message)
            peer.connection.close()
        with contextlib.suppress(OSError):
            self._token.unlink(missing_ok=True)

    def _all(self) -> list[Peer]:
        with self._guard:
            return list(self._peers.values())

    def _missing(self) -> list[int]:
        if self._refused is not None:
            raise RecipeError(self._refused)
        for peer in self._all():
            with contextlib.suppress(MachineLostError):
                self.check()
            if not peer.shares and (self._remote is None or peer.remote != self._remote):
                raise RecipeError(
                    f"{peer} sees neither the cache of this machine ({self._token.parent.parent}) nor its remote: expected "
                    "one cache folder (--cache) for all machines, or one [cache] remote with upload that all of them reach, "
                    f"got the remote {self._remote or 'none'} here and {peer.remote or 'none'} there"
                )
        return [rank for rank in range(1, self.layout.machines) if rank not in self._peers]

    def _handle(self, peer: Peer, message: Message) -> None:
        match message:
            case {"do": "ready", "attempt": int(attempt)}:
                peer.ready = attempt
            case {"do": "failed", "attempt": attempt, "cause": str(cause), "again": bool(again)} if attempt == self._attempt:
                peer.fault = PeerFailedError(f"{peer}: {cause}", again=again)
            case {"do": "refuse", "why": str(why)}:
                raise RecipeError(f"{peer}: {why}")
            case {"do": "note", "text": str(text)}:
                self._note(f"{peer}: {text}")
            case {"do": "stop"}:
                self._note(f"{peer} was asked to stop")
                self._stop.requested = True

    def _let_in(self, listener: socket.socket) -> None:
        while True:
            try:
                connected, (address, *_) = listener.accept()
            except OSError:
                return  # closed
            if self._greeting.acquire(blocking=False):
                threading.Thread(target=self._greet, args=[connected, address], daemon=True, name="welcome").start()
            else:
                connected.close()

    def _greet(self, connected: socket.socket, address: str) -> None:
        """Lets in a machine that knows the secret."""
        try:
            self._welcome(Connection(connected, self._secret, is_main=True))
        except ForeignError:
            if not self._told_of_strangers:
                self._note(
                    f"{address} connected to port {self.layout.port} with another secret and was turned away; machines of "
                    "this run share one (see `Several machines` in the guide)"
                )
            self._told_of_strangers = True
        except ConnectionClosed:
            pass
        finally:
            self._greeting.release()

    def _welcome(self, connection: Connection) -> None:
        """Introduces this machine to a new one and registers or refuses it."""
        connection.send(do="welcome", who=str(this_machine()), token=self._token.name, machines=self.layout.machines)
        message = connection.receive(HELLO_SECONDS)
        match message:
            case {
                "do": "hello",
                "rank": int(rank),
                "machines": int(machines),
                "who": str(who),
                "shares": bool(shares),
                "remote": remote,
            }:
                peer = Peer(rank, who, shares, remote or None, connection)
                if refusal := self._refusal(peer, machines):
                    self._refused = refusal
                    connection.send(do="over", code=RecipeError.exit_code, message=refusal)
            case _:
                connection.close()

    def _refusal(self, peer: Peer, machines: int) -> str | None:
        """Why a new machine, started for so many `machines`, cannot join; None once it is registered."""
        if machines != self.layout.machines:
            here = self.layout.machines
            return f"machine {peer.rank} ({peer.who}) was started for {machines} machines, and machine 0 for {here}"
        if not 0 < peer.rank < self.layout.machines:
            return f"machine_rank: expected 1 to {self.layout.machines - 1}, got {peer.rank}"
        with self._guard:
            if other := self._peers.get(peer.rank):
                if other.connection.silence < REPLACE_SECONDS:
                    return f"two machines have rank {peer.rank}: {other.who}, and {peer.who}"
                self._lost.append(str(other))
            self._seen.add(peer.rank)
            self._peers[peer.rank] = peer
        return None


@contextlib.contextmanager
def opened(coordinator: Coordinator) -> Iterator[Coordinator]:
    """The coordinator during a run; at its end the other machines learn how it ended."""
    code, message = 1, "the run of machine 0 crashed"
    try:
        coordinator.open()
        yield coordinator
        code, message = 0, ""
    except StockpotError as error:
        code, message = error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "the run was asked to stop"
        raise
    finally:
        coordinator.close(code, message)

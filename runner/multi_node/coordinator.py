"""The machine of rank 0 among those of a run: it lets the others in, has them agree to each training before it starts, and
notices when one fails, leaves or is gone.

The others are `runner.multi_node.participant`. Both only talk: what is trained together is between the processes of
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
from typing import Any, Protocol

from runner.cache.heartbeat import this_machine
from runner.errors import MachineLostError, PeerFailedError, RecipeError, StageError, StockpotError
from runner.execution.node_layout import Layout
from runner.multi_node.connection import Gone, Message, Wire

JOIN_SECONDS = 600.0  # until a machine that never came fails the run; a queue lets them begin at different times
QUIET_SECONDS = 5.0  # without a sign of life; then another that comes with the same rank takes its place
REPORT_SECONDS = 5.0  # after a training failed here, for the others to say what they saw
INTERRUPTED = 130
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class Peer:
    """Another machine, as it introduced itself."""

    rank: int
    who: str  # process and host
    shares: bool  # sees the cache of this machine
    remote: str | None
    wire: Wire
    ready: int = 0  # the last attempt that it is ready for
    fault: PeerFailedError | None = None  # of its part of the last attempt

    def __str__(self) -> str:
        return f"machine {self.rank} ({self.who})"


class Stop(Protocol):
    """A request to checkpoint and end."""

    requested: bool


class Team:
    """What the machine of rank 0 knows of the others."""

    def __init__(
        self,
        layout: Layout,
        cache: Path,
        *,
        remote: str | None,  # whose artifacts the others can fetch
        note: Callable[[str], None],
        stop: "Stop",
        rejoin_seconds: float,
    ) -> None:
        self.layout, self._remote, self._note, self._stop = layout, remote, note, stop
        self._rejoin_seconds = rejoin_seconds
        self._token = cache / "machines" / uuid.uuid4().hex
        self._peers: dict[int, Peer] = {}
        self._met: set[int] = set()  # ranks of those who have been there
        self._lost: list[str] = []  # who was replaced by another of the same rank, for the next check
        self._given_up = False
        self._guard = threading.Lock()
        self._refused: str | None = None
        self._attempt = 0
        self._door: socket.socket | None = None

    @property
    def shares_cache(self) -> bool:
        """Whether all machines see the cache of this one."""
        return all(peer.shares for peer in self._peers.values())

    def open(self) -> None:
        """Listens for the others; they may come at any time."""
        self._token.parent.mkdir(parents=True, exist_ok=True)
        self._token.write_text(str(this_machine()), encoding="utf-8")
        host = self.layout.host if self.layout.host in LOOPBACK else ""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._door = socket.create_server((host, self.layout.port), family=family)
        except OSError as error:
            raise StageError(
                f"port {self.layout.port} of this machine: expected to be free for the other machines; found: {error.strerror}. "
                "Name another one on each of them: --main-address HOST:PORT"
            ) from error
        threading.Thread(target=self._let_in, args=[self._door], daemon=True, name="door").start()

    @property
    def is_broken(self) -> bool:
        """Whether a machine was given up and is still away."""
        return self._given_up and bool(self._missing())

    def give_up(self) -> None:
        """Goes on without the machines that are away; where they are back at the next training, they take part."""
        self._given_up = True

    def assemble(self) -> None:
        """Waits until all machines are there; MachineLostError if one that was there does not come back."""
        told, begun = "", time.monotonic()
        while missing := self._missing():
            was_here = self._met.issuperset(missing)
            patience = self._rejoin_seconds if was_here else JOIN_SECONDS
            listed = ", ".join(map(str, missing))
            if listed != told:
                self._note(
                    f"waiting for machine {listed} of {self.layout.machines} at port {self.layout.port}: there, run the same "
                    "recipe with its --machine-rank"
                )
                told = listed
            if time.monotonic() - begun > patience:
                kind, came = (MachineLostError, "come back") if was_here else (StageError, "come")
                raise kind(f"machine {listed} of {self.layout.machines} did not {came} within {patience:.0f} s")
            self._raise_if_stopped()
            time.sleep(0.1)
        self._given_up = False

    def begin(self, stage: str, announcement: Mapping[str, Any]) -> None:
        """Returns when all machines, assembled before, are ready to start the training that is announced, and told to."""
        self._attempt += 1
        self._lost.clear()
        for peer in self._all():
            peer.fault = None
            peer.wire.send(do="train", attempt=self._attempt, stage=stage, **announcement)
        while [peer for peer in self._all() if peer.ready != self._attempt]:
            self._raise_if_stopped()
            self.check()
            time.sleep(0.05)
        for peer in self._all():
            peer.wire.send(do="go", attempt=self._attempt)

    def check(self) -> None:
        """PeerFailedError or MachineLostError if a machine failed or is gone, RecipeError if one cannot agree; passes a
        request to stop on.
        """
        for peer in [] if self._stop.requested else self._all():
            try:
                while message := peer.wire.receive():
                    self._hear(peer, message)
            except Gone:
                with self._guard:
                    self._peers.pop(peer.rank, None)
                raise MachineLostError(f"{peer} is gone; what was checkpointed is kept") from None
        if self._lost:
            raise MachineLostError(f"{self._lost.pop()} is gone; what was checkpointed is kept")
        for peer in self._all():
            fault, peer.fault = peer.fault, None
            if fault is not None:
                raise fault

    def causes(self) -> list[str]:
        """After a training failed here: what the others say of it, within a few seconds. Raises what ends it for good."""
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

    def tell(self, text: str) -> None:
        """Says to the others what goes on here; whatever they were at is over."""
        for peer in self._all():
            peer.wire.send(do="note", text=text)

    def close(self, code: int, message: str) -> None:
        """Tells the others how the run ended."""
        with self._guard:
            if self._door is not None:
                self._door.close()
                self._door = None
        for peer in self._all():
            peer.wire.send(do="over", code=code, message=message)
            peer.wire.close()
        with contextlib.suppress(OSError):
            self._token.unlink(missing_ok=True)

    def _raise_if_stopped(self) -> None:
        if self._stop.requested:
            raise KeyboardInterrupt

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
                    f"{peer} sees neither the cache of this machine ({self._token.parent.parent}) nor its remote: several "
                    "machines: expected one cache folder (--cache), or one [cache] remote that all reach and that is uploaded to, "
                    f"got the remote {self._remote or 'none'} here and {peer.remote or 'none'} there"
                )
        return [rank for rank in range(1, self.layout.machines) if rank not in self._peers]

    def _hear(self, peer: Peer, message: Message) -> None:
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

    def _let_in(self, door: socket.socket) -> None:
        while True:
            try:
                connection, _ = door.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._welcome, args=[Wire(connection)], daemon=True, name="welcome").start()

    def _welcome(self, wire: Wire) -> None:
        """Introduces this machine to one that knocked, and hears who that is."""
        try:
            wire.send(do="welcome", who=str(this_machine()), token=self._token.name, machines=self.layout.machines)
            match wire.receive(JOIN_SECONDS):
                case {
                    "do": "hello",
                    "rank": int(rank),
                    "machines": int(machines),
                    "who": str(who),
                    "shares": bool(shares),
                    **more,
                }:
                    fault = None
                    if machines != self.layout.machines:
                        fault = (
                            f"machine {rank} ({who}) was told of {machines} machines, and machine 0 of {self.layout.machines}"
                        )
                    with self._guard:
                        if fault is None and (other := self._peers.get(rank)):
                            if other.wire.quiet < QUIET_SECONDS:
                                fault = f"two machines have rank {rank}: {other.who}, and {who}"
                            else:
                                self._lost.append(str(other))
                        if fault is None and not 0 < rank < self.layout.machines:
                            fault = f"machine_rank: expected 1 to {self.layout.machines - 1}, got {rank}"
                        if fault is None:
                            remote = more.get("remote")
                            self._met.add(rank)
                            self._peers[rank] = Peer(rank, who, shares, str(remote) if remote else None, wire)
                    if fault is not None:
                        self._refused = fault
                        wire.send(do="over", code=RecipeError.exit_code, message=fault)
                case _:
                    wire.close()
        except Gone:
            wire.close()


@contextlib.contextmanager
def opened(team: Team) -> Iterator[Team]:
    """The team while a run goes on; when that ends, the others are told how."""
    code, message = 1, "the run there broke off"
    try:
        team.open()
        yield team
        code, message = 0, ""
    except StockpotError as error:
        code, message = error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "the run was asked to stop"
        raise
    finally:
        team.close(code, message)

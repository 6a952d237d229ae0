"""A machine of rank 1 or higher: it takes part in the trainings of machine 0 (`runner.multi_node.coordinator`) and waits for
every other stage.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.cache.heartbeat import this_machine
from runner.cache.integrity import ARTIFACT_NAME
from runner.cache.origins import MACHINE
from runner.cache.record import Record
from runner.cache.remote import Mirror
from runner.cache.store import Store
from runner.errors import GateError, PausedError, RecipeError, StageError, StockpotError
from runner.execution.node_layout import Layout
from runner.execution.stage_run import MachineError, StageRun
from runner.execution.stop import LockWait, StopRequest
from runner.graph import differences
from runner.multi_node.connection import Connection, ConnectionClosed, ForeignError
from runner.multi_node.coordinator import INTERRUPTED, JOIN_SECONDS
from runner.multi_node.messages import Message
from runner.multi_node.secret import VARIABLE
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.reporting.progress import RunView
from runner.resources import process_count
from runner.stages import stage_kinds

RETRY_SECONDS = 1.0  # between two attempts to connect
SHARED_SECONDS = 3.0  # for a new file of one machine to appear on another that shares the folder
END_SECONDS = 60.0  # for the processes here to end after those of machine 0


class Participant:
    """One run of one recipe on a machine other than machine 0."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        progress: RunView,
        stop: StopRequest,
        *,
        remote: str | None,
        layout: Layout,
        secret: bytes,  # that all machines of the run know
    ) -> None:
        self._recipe, self._store, self._progress, self._stop = recipe, store, progress, stop
        self._remote, self._layout, self._secret = remote, layout, secret
        self._shares = False

    def run(self, *, until: str | None = None, force: bool = False) -> None:
        """Takes part until machine 0 ends, then ends the same way."""
        where = f"{self._layout.host}:{self._layout.port}"
        seconds, rejoin = JOIN_SECONDS, 60 * self._recipe.head.parallel.rejoin_minutes
        while connection := self._connect(where, seconds, done=lambda: not force and self._is_done(until)):
            with contextlib.closing(connection), contextlib.suppress(ConnectionClosed):
                leader = self._introduce(connection)
                self._progress.note(f"machine {self._layout.rank} of {self._layout.machines}; machine 0 is {leader}")
                self._take_part(connection, until)
                return
            seconds = rejoin
            self._progress.note(f"machine 0 is gone; checkpoints are kept; waiting {rejoin:.0f} s for it to come back")
        self._progress.note("everything is cached; nothing to take part in")

    def _connect(self, where: str, seconds: float, *, done: Callable[[], bool]) -> Connection | None:
        """A connection to machine 0; None if meanwhile nothing is left to do."""
        deadline, noted = time.monotonic() + seconds, False
        while not done():
            try:
                connected = socket.create_connection((self._layout.host, self._layout.port), timeout=10)
                return Connection(connected, self._secret, is_main=False)
            except (OSError, ConnectionClosed) as error:
                if time.monotonic() > deadline:
                    raise StageError(
                        f"machine 0 did not answer at {where} within {seconds:.0f} s ({error}); check that a run is active "
                        "there and that this machine can reach the port"
                    ) from error
            if not noted:
                self._progress.note(f"waiting for machine 0 at {where}")
                noted = True
            self._stop.sleep(RETRY_SECONDS)
        return None

    def _introduce(self, connection: Connection) -> str:
        """Tells machine 0 who this machine is and whether it shares the cache; returns who machine 0 is."""
        try:
            message = self._next(connection)
        except ForeignError:
            raise StageError(
                f"machine 0 at {self._layout.host}:{self._layout.port} has another secret than this machine; copy its file "
                f"machines.secret to all machines, or set {VARIABLE} to the same value"
            ) from None
        token = self._store.root / "machines" / str(message["token"])
        deadline = time.monotonic() + SHARED_SECONDS
        while not (shares := _is_seen(token)) and time.monotonic() < deadline:
            self._stop.sleep(0.2)
        self._shares = shares
        rank, machines, who = self._layout.rank, self._layout.machines, str(this_machine())
        connection.send(do="hello", rank=rank, machines=machines, who=who, shares=shares, remote=self._remote)
        return str(message.get("who"))

    def _take_part(self, connection: Connection, until: str | None) -> None:
        message = self._next(connection)
        while True:
            match message:
                case {"do": "train", "stage": stage}:
                    message = self._train(connection, stage, message, until)
                    continue
                case {"do": "note", "text": str(text)}:
                    self._progress.note(f"machine 0: {text}")
                case {"do": "over", "code": int(code), "message": str(text)}:
                    return self._end(code, text)
            message = self._next(connection)

    def _train(self, connection: Connection, name: str, message: Message, until: str | None) -> Message:
        """Takes part in one training; returns the message that ended it."""
        attempt = message["attempt"]
        ended: list[Message] = []
        try:
            plan = self._agreed(name, message, until)
            with self._prepared(plan.entries[name], plan) as work:
                work.take_part(
                    self._progress,
                    self._stop,
                    ready=lambda: self._report_ready(connection, attempt, ended),
                    tick=self._listener(connection, ended),
                )
                if not self._shares:
                    self._store.discard_work(plan.entries[name].stage, str(plan.entries[name].key))
        except RecipeError as error:
            connection.send(do="refuse", attempt=attempt, why=str(error))
        except StageError as error:
            connection.send(do="failed", attempt=attempt, cause=str(error), again=isinstance(error, MachineError))
        except (PausedError, _EndedError):
            pass  # machine 0 decides what follows
        return ended[0] if ended else self._next(connection)

    def _report_ready(self, connection: Connection, attempt: int, ended: list[Message]) -> None:
        """Returns when machine 0 starts the training."""
        connection.send(do="ready", attempt=attempt)
        message = self._next(connection)
        if message.get("do") != "go":
            ended.append(message)
            raise _EndedError

    def _listener(self, connection: Connection, ended: list[Message]) -> Callable[[], None]:
        """Called while the processes run: handles messages of machine 0 and a request to stop."""
        stop_sent = False
        deadline: list[float] = []

        def tick() -> None:
            nonlocal stop_sent
            if self._stop.requested and not stop_sent:
                stop_sent = True
                connection.send(do="stop")
            if not ended and (message := connection.receive()):
                ended.append(message)
                deadline.append(time.monotonic() + (END_SECONDS if message.get("code") == 0 else 5.0))
            if ended and time.monotonic() > deadline[0]:
                raise _EndedError

        return tick

    def _agreed(self, name: str, message: Message, until: str | None) -> Plan:
        """The plan here; RecipeError if it differs from that of machine 0."""
        plan = self._plan(message, until)
        if name not in plan.entries:
            raise RecipeError(f"stage {name!r}: expected in the recipe here, since machine 0 trains it, got no such stage")
        above = plan.above(name)
        for entry in (*(entry for entry in plan if entry.name in above), plan.entries[name]):
            other, theirs = entry.name, message["identities"].get(entry.name)
            if theirs is None and entry.name != name:
                continue  # not finished, and not needed for this training
            if theirs is None or entry.identity is None:
                raise RecipeError(f"stage {other!r}: {entry.reason}, while machine 0 knows its inputs")
            if changes := differences(theirs, entry.identity):
                raise RecipeError(f"stage {other!r} differs from that of machine 0: {'; '.join(changes)}")
        if (processes := process_count(self._recipe.head.parallel)) != message["processes"]:
            raise RecipeError(
                f"stage {name!r}: expected {message['processes']} processes as on machine 0, got {processes}; "
                f"set --processes N "
                "to the same number on every machine"
            )
        if not self._shares:
            mirror = Mirror(self._remote, note=self._progress.note, tick=self._stop.raise_if_requested, upload=False)
            for source in plan.inputs(name):
                self._fetch(plan, source, mirror)
        return plan

    def _plan(self, message: Message, until: str | None) -> Plan:
        """The plan here, with the records of machine 0."""
        if not self._shares:
            for record in map(_record, message["records"]):
                if self._store.record(record.kind, record.key) is None:
                    self._store.remember(record, origin=f"{MACHINE}{self._layout.host}")
        return Plan(self._recipe, self._store, until=until)

    def _fetch(self, plan: Plan, source: str, mirror: Mirror) -> None:
        record = plan.record(source)
        with self._store.lock(record.kind, record.key, waiting=self._lock_wait(source)):
            if not self._store.has_artifact(record) and not mirror.fetch(self._store, record):
                raise StageError(f"stage {source!r}: expected its artifact here or in the remote {self._remote}, got neither")

    @contextlib.contextmanager
    def _prepared(self, entry: Entry, plan: Plan) -> Iterator[StageRun]:
        """The work of a stage here, while its lock and those of its inputs are held."""
        sources = {source: plan.record(source) for source in plan.inputs(entry.name)}
        with contextlib.ExitStack() as held:
            stage, key = entry.stage, str(entry.key)
            if self._shares:  # machine 0 holds the key
                log = held.enter_context(self._store.open_log(stage, key))
            else:
                log = held.enter_context(self._store.lock(stage, key, waiting=self._lock_wait(entry.name)))
            held.enter_context(self._store.reading(sources.values(), waiting=self._lock_wait(entry.name)))
            for source, record in sources.items():
                if not self._store.has_artifact(record, reread=True):
                    raise StageError(
                        f"stage {source!r}: its artifact does not match its record on this machine; run `run verify`"
                    )
            self._progress.started(entry)
            yield StageRun(entry, plan, self._recipe, self._store, log, layout=self._layout, owns_scratch=not self._shares)

    def _end(self, code: int, text: str) -> None:
        """Ends this run the way machine 0 ended."""
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            kinds: list[type[StockpotError]] = [RecipeError, GateError, PausedError]
            raise next((kind for kind in kinds if kind.exit_code == code), StageError)(f"machine 0: {text}")
        self._progress.note("machine 0 has finished")

    def _is_done(self, until: str | None) -> bool:
        return Plan(self._recipe, self._store, until=until).next() is None

    def _next(self, connection: Connection) -> Message:
        while (message := connection.receive(0.2)) is None:
            self._stop.raise_if_requested()
        return message

    def _lock_wait(self, name: str) -> LockWait:
        return LockWait(name, self._stop, self._progress.note)


class _EndedError(Exception):
    """Machine 0 ended an attempt, and the processes here still run."""


def _record(sealed: str) -> Record:
    """A record of machine 0, whose kind and key become names of files; StageError if they are none."""
    try:
        record = Record.unsealed(sealed.encode())
        if ARTIFACT_NAME.fullmatch(record.name) and record.kind in stage_kinds():
            return record
    except (ValueError, KeyError, RecursionError):
        pass
    raise StageError("machine 0 sent a record that is damaged or of no known stage")


def _is_seen(path: Path) -> bool:
    """Whether a file exists, by listing its folder: network file systems cache for a while that a file is missing."""
    try:
        return path.name in {other.name for other in path.parent.iterdir()}
    except OSError:
        return False

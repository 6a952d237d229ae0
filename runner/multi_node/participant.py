"""A machine of another rank than 0: it takes part in the trainings of the machine of rank 0 (`runner.multi_node.coordinator`), and
waits for everything else that one makes.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.cache.heartbeat import this_machine
from runner.cache.record import Record
from runner.cache.remote import Mirror
from runner.cache.store import Store, Waiting
from runner.errors import GateError, PausedError, RecipeError, StageError, StockpotError
from runner.execution.node_layout import Layout
from runner.execution.stage_run import MachineError, StageRun, StopRequest
from runner.graph import differences
from runner.multi_node.connection import Gone, Message, Wire
from runner.multi_node.coordinator import INTERRUPTED, JOIN_SECONDS
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.reporting.progress import Progress
from runner.resources import process_count

RETRY_SECONDS = 1.0  # between two knocks at a door that is not open yet
SHARED_SECONDS = 3.0  # for a file of one machine to be seen by another that shares the folder and had not looked there before
END_SECONDS = 60.0  # for the processes here to end after those of machine 0 have


class Joining:
    """One run of one recipe on a machine that is not the first."""

    def __init__(
        self, recipe: Recipe, store: Store, progress: Progress, stop: StopRequest, *, remote: str | None, layout: Layout
    ) -> None:
        self._recipe, self._store, self._progress, self._stop = recipe, store, progress, stop
        self._remote, self._layout = remote, layout
        self._shares = False

    def run(self, *, until: str | None = None, force: bool = False) -> None:
        """Takes part until the machine of rank 0 has ended, and then ends as it did."""
        where = f"{self._layout.host}:{self._layout.port}"
        patience, rejoin = JOIN_SECONDS, 60 * self._recipe.head.parallel.rejoin_minutes
        while wire := self._knock(where, patience, done=lambda: not force and self._is_done(until)):
            with contextlib.closing(wire), contextlib.suppress(Gone):
                leader = self._introduce(wire)
                self._progress.note(f"machine {self._layout.rank} of {self._layout.machines}; machine 0 is {leader}")
                self._take_part(wire, until)
                return
            patience = rejoin
            self._progress.note(
                f"machine 0 is gone; what was checkpointed is kept, and it has {rejoin:.0f} s to be there again"
            )
        self._progress.note("everything is cached; nothing to take part in")

    def _knock(self, where: str, patience: float, *, done: Callable[[], bool]) -> Wire | None:
        """A wire to machine 0; None if in the meantime nothing is left to do."""
        deadline, told = time.monotonic() + patience, False
        while not done():
            try:
                return Wire(socket.create_connection((self._layout.host, self._layout.port), timeout=10))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise StageError(
                        f"machine 0 did not answer at {where} within {patience:.0f} s ({error}); does a run go on there, "
                        "and may this machine reach that port?"
                    ) from error
            if not told:
                self._progress.note(f"waiting for machine 0 at {where}")
                told = True
            self._pause(RETRY_SECONDS)
        return None

    def _introduce(self, wire: Wire) -> str:
        """Tells machine 0 who this is and whether both see one cache; returns who machine 0 is."""
        message = self._next(wire)
        token = self._store.root / "machines" / Path(str(message.get("token"))).name
        deadline = time.monotonic() + SHARED_SECONDS
        self._shares = _is_seen(token)
        while not self._shares and time.monotonic() < deadline:
            self._pause(0.2)
            self._shares = _is_seen(token)
        wire.send(
            do="hello",
            rank=self._layout.rank,
            machines=self._layout.machines,
            who=str(this_machine()),
            shares=self._shares,
            remote=self._remote,
        )
        return str(message.get("who"))

    def _take_part(self, wire: Wire, until: str | None) -> None:
        message = self._next(wire)
        while True:
            match message:
                case {"do": "train", "stage": str(stage)}:
                    message = self._train(wire, stage, message, until)
                    continue
                case {"do": "note", "text": str(text)}:
                    self._progress.note(f"machine 0: {text}")
                case {"do": "over", "code": int(code), "message": str(text)}:
                    return self._end(code, text)
            message = self._next(wire)

    def _train(self, wire: Wire, name: str, message: Message, until: str | None) -> Message:
        """Trains together with the others; returns the message that ended it."""
        attempt = message["attempt"]
        ended: list[Message] = []
        try:
            plan = self._agreed(name, message, until)
            with self._prepared(plan.entries[name], plan) as work:
                work.join(
                    self._progress,
                    self._stop,
                    ready=lambda: self._report_ready(wire, attempt, ended),
                    tick=self._listener(wire, ended),
                )
                if not self._shares:
                    self._store.discard_work(plan.entries[name].stage, str(plan.entries[name].key))
        except RecipeError as error:
            wire.send(do="refuse", attempt=attempt, why=str(error))
        except StageError as error:
            wire.send(do="failed", attempt=attempt, cause=str(error), again=isinstance(error, MachineError))
        except (PausedError, _EndedError):
            pass  # machine 0 says how it goes on
        return ended[0] if ended else self._next(wire)

    def _report_ready(self, wire: Wire, attempt: int, ended: list[Message]) -> None:
        """Returns when machine 0 has all machines begin."""
        wire.send(do="ready", attempt=attempt)
        message = self._next(wire)
        if message.get("do") != "go":
            ended.append(message)
            raise _EndedError

    def _listener(self, wire: Wire, ended: list[Message]) -> Callable[[], None]:
        """What is looked at while the processes run: what machine 0 says, and a request to stop."""
        told: list[bool] = []
        deadline: list[float] = []

        def tick() -> None:
            if self._stop.requested and not told:
                told.append(True)
                wire.send(do="stop")
            if not ended and (message := wire.receive()):
                ended.append(message)
                deadline.append(time.monotonic() + (END_SECONDS if message.get("code") == 0 else 5.0))
            if ended and time.monotonic() > deadline[0]:
                raise _EndedError

        return tick

    def _agreed(self, name: str, message: Message, until: str | None) -> Plan:
        """The plan here; RecipeError says where it is another one than that of machine 0."""
        plan = self._plan(message, until)
        if name not in plan.entries:
            raise RecipeError(f"stage {name!r}: machine 0 trains it, and the recipe here has no such stage")
        above = plan.above(name)
        for entry in (*(one for one in plan if one.name in above), plan.entries[name]):
            other, theirs = entry.name, message["identities"].get(entry.name)
            if theirs is None and entry.name != name:
                continue  # not made yet, and not needed for this training
            if theirs is None or entry.identity is None:
                raise RecipeError(f"stage {other!r}: {entry.reason}, while machine 0 knows what it reads")
            if changes := differences(theirs, entry.identity):
                raise RecipeError(f"stage {other!r} differs from that of machine 0: {'; '.join(changes)}")
        if (processes := process_count(self._recipe.head.parallel)) != message["processes"]:
            raise RecipeError(
                f"stage {name!r}: each machine: expected as many processes, got {processes} here and {message['processes']} on "
                "machine 0 (--processes N)"
            )
        if not self._shares:
            mirror = Mirror(self._remote, note=self._progress.note, tick=self._raise_if_stopped, upload=False)
            for source in plan.inputs(name):
                self._fetch(plan, source, mirror)
        return plan

    def _plan(self, message: Message, until: str | None) -> Plan:
        """The plan here, with the records of what machine 0 has."""
        if not self._shares:
            for record in (Record.unsealed(sealed.encode()) for sealed in message["records"]):
                if self._store.record(record.kind, record.key) is None:
                    self._store.remember(record)
        return Plan(self._recipe, self._store, until=until)

    def _fetch(self, plan: Plan, source: str, mirror: Mirror) -> None:
        record = plan.record(source)
        with self._store.lock(record.kind, record.key, waiting=self._patience(source)):
            if not self._store.has_artifact(record) and not mirror.fetch(self._store, record):
                raise StageError(f"stage {source!r}: its artifact is neither here nor at the remote {self._remote}")

    @contextlib.contextmanager
    def _prepared(self, entry: Entry, plan: Plan) -> Iterator[StageRun]:
        """The work of a stage here, with everything in place that it reads."""
        sources = {source: plan.record(source) for source in plan.inputs(entry.name)}
        with contextlib.ExitStack() as held:
            stage, key = entry.stage, str(entry.key)
            if self._shares:  # machine 0 holds the key
                log = held.enter_context(self._store.open_log(stage, key))
            else:
                log = held.enter_context(self._store.lock(stage, key, waiting=self._patience(entry.name)))
            held.enter_context(self._store.reading(sources.values(), waiting=self._patience(entry.name)))
            for source, record in sources.items():
                if not self._store.has_artifact(record, reread=True):
                    raise StageError(f"stage {source!r}: its artifact does not match its record on this machine")
            self._progress.started(entry)
            yield StageRun(entry, plan, self._recipe, self._store, log, layout=self._layout, owns_scratch=not self._shares)

    def _end(self, code: int, text: str) -> None:
        """Ends this run as machine 0 ended its own."""
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            kinds: dict[int, type[StockpotError]] = {
                kind.exit_code: kind for kind in (RecipeError, GateError, PausedError, StageError)
            }
            raise kinds.get(code, StageError)(f"machine 0: {text}")
        self._progress.note("machine 0 has finished")

    def _is_done(self, until: str | None) -> bool:
        return Plan(self._recipe, self._store, until=until).next() is None

    def _next(self, wire: Wire) -> Message:
        while (message := wire.receive(0.2)) is None:
            self._raise_if_stopped()
        return message

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._raise_if_stopped()
            time.sleep(0.1)

    def _patience(self, name: str) -> "_Patience":
        return _Patience(name, self)

    def _raise_if_stopped(self) -> None:
        if self._stop.requested:
            raise KeyboardInterrupt


class _EndedError(Exception):
    """Machine 0 is done with an attempt, and the processes here are not."""


class _Patience(Waiting):
    def __init__(self, name: str, joining: Joining) -> None:
        self._name, self._joining = name, joining

    def started(self, holder: str) -> None:
        self._joining._progress.note(f"{self._name}: waiting for {holder}")

    def tick(self) -> None:
        self._joining._raise_if_stopped()


def _is_seen(path: Path) -> bool:
    """Whether a file is there, by listing its folder: disks of the network remember for a while what was not there."""
    try:
        return path.name in {other.name for other in path.parent.iterdir()}
    except OSError:
        return False

"""The folder in which a run and the nodes of one stage meet: what they tell each other through the shared cache.

    nodes/<random>/        in the scratch folder of the stage; a node that does not see it does not share the cache
        <rank>             of each node: its facts, and a counter that it raises every second
        main               where the launchers of all nodes meet, published by the node of rank 0
        stacks             asks for the stacks of all processes

A node ends its processes when its standard input closes, and also when the folder is gone.
"""

import json
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.files import write_whole

FOLDER = "nodes"
MAIN, STACKS = "main", "stacks"
BEAT_SECONDS = 1.0  # between two beats of a node
LOOK_SECONDS = 2.0  # between two looks at the beats
SILENT_SECONDS = 30.0  # without a beat, on the clock of the run: a node that is frozen, or whose cable is pulled


def is_seen(path: Path) -> bool:
    """Whether a file exists, by listing its folder: network file systems cache for a while that a file is missing."""
    try:
        return path.name in os.listdir(path.parent)  # noqa: PTH208  # names alone
    except OSError:
        return False


@dataclass
class _Seen:
    """The last state of a node."""

    facts: dict[str, Any]
    silent: float = 0.0  # seconds


class Meeting:
    """The side of the run: the nodes that have come, and which of them are silent."""

    def __init__(self, scratch: Path, nodes: int) -> None:
        self.name = uuid.uuid4().hex
        self.nodes = nodes
        self._folder = scratch / FOLDER / self.name
        shutil.rmtree(scratch / FOLDER, ignore_errors=True)  # ends what is left of earlier launches
        self._folder.mkdir(parents=True)
        self._seen: dict[int, _Seen] = {}
        self._looked = time.monotonic()

    def look(self) -> None:
        """Reads the beats, at most every LOOK_SECONDS; time in which this process was suspended does not count."""
        passed = time.monotonic() - self._looked
        if passed < LOOK_SECONDS and len(self._seen) == self.nodes:
            return
        self._looked += passed
        for rank in range(self.nodes):
            try:
                facts = json.loads((self._folder / str(rank)).read_bytes())
            except (OSError, ValueError):
                facts = None
            seen = self._seen.get(rank)
            if facts is not None and (seen is None or facts != seen.facts):
                self._seen[rank] = _Seen(facts)
            elif seen is not None and not seen.facts.get("ended"):
                seen.silent += min(passed, 2 * LOOK_SECONDS)

    @property
    def has_begun(self) -> bool:
        """Whether any node has come."""
        return bool(self._seen)

    def silent(self) -> str | None:
        """A node that was silent for too long, in words."""
        for seen in self._seen.values():
            if seen.silent > SILENT_SECONDS:
                return f"node {seen.facts['node']} has not answered for {seen.silent:.0f} s"
        return None

    def names(self) -> list[str]:
        """The nodes, by rank."""
        return [self._seen[rank].facts["node"] for rank in sorted(self._seen)]

    def show_stacks(self) -> None:
        """Asks all nodes for the stacks of their processes."""
        (self._folder / STACKS).touch()
        time.sleep(2 * BEAT_SECONDS)

    def end(self) -> None:
        """Removes the folder, which ends nodes that have not ended yet."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Seat:
    """The side of a node."""

    def __init__(self, scratch: Path, meeting: str, rank: int, node: str) -> None:
        self.folder, self._rank = scratch / FOLDER / meeting, rank
        self._facts: dict[str, Any] = {"node": node, "beats": 0}

    def is_seen(self, seconds: float) -> bool:
        """Whether this node sees the folder of the run, within some seconds."""
        deadline = time.monotonic() + seconds
        while not (seen := is_seen(self.folder)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return seen

    def beat(self) -> bool:
        """Tells the run that this node is alive; whether the run still wants it."""
        self._facts["beats"] += 1
        if not is_seen(self.folder):
            return False
        try:
            write_whole(self.folder / str(self._rank), json.dumps(self._facts), durable=False)
        except OSError:
            return is_seen(self.folder)  # a temporary fault of a network file system, or the folder has just been removed
        return True

    def leave(self) -> None:
        """Tells the run that the processes of this node have ended, so that its silence means nothing."""
        self._facts["ended"] = True
        self.beat()

    def publish(self, host: str, port: int) -> None:
        """Tells the other nodes where the launchers meet."""
        write_whole(self.folder / MAIN, json.dumps({"host": host, "port": port}))

    def main(self) -> tuple[str, int] | None:
        """Where the launchers meet; None while it is not known."""
        if not is_seen(self.folder / MAIN):
            return None
        found = json.loads((self.folder / MAIN).read_bytes())
        return str(found["host"]), int(found["port"])

    def wants_stacks(self) -> bool:
        """Whether the run asks for stacks."""
        return is_seen(self.folder / STACKS)

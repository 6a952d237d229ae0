"""The interface of engines: what a run asks of the place where its processes run.

A `Gang` is the group of processes of one stage, on all of its nodes, seen as one process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

REFUSED = 78  # exit code of a node that cannot take part; a line of the log that begins with REFUSAL says why
REFUSAL = "stockpot: "


class Process(Protocol):
    """The part of `subprocess.Popen` that is used of a process that was started or forked."""

    pid: int

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; subprocess.TimeoutExpired after `timeout` seconds."""


Fork = Callable[..., Process]  # starts a single worker, as `runner.execution.fork_server.ForkServer.start` for its modules


class Gang(Protocol):
    """The processes of a stage on all of their nodes, seen as one."""

    def poll(self) -> int | None:
        """The exit code; None while they run."""

    def end(self) -> None:
        """Ends what still runs, on every node."""

    def waits_for(self) -> str | None:
        """What they wait for before they can start, in words, empty while it is not known; None once they run."""

    def fault(self) -> str | None:
        """What happened to a node, in words; None if nothing is known to be wrong."""

    def show_stacks(self) -> None:
        """Makes every process write the stacks of its threads to the log."""

    def facts(self) -> dict[str, Any]:
        """The engine, its nodes and its job, for the record; empty on this machine alone."""


@dataclass(frozen=True)
class Wish:
    """The processes that a stage needs."""

    job: Path  # the job file, in the scratch folder of the stage
    nodes: int = 1
    per_node: int = 1  # processes
    threads: int = 1  # of each process, where the engine does not decide
    gpus: bool = False  # whether they use GPUs where there are some
    code: str = ""  # the digest of the code, which is the same on every node
    arguments: tuple[str, ...] = ()  # more words for a single worker


@dataclass(frozen=True)
class Node:
    """A machine of a cluster."""

    name: str
    state: str
    cores: int
    gpus: int = 0


@dataclass(frozen=True)
class Capacity:
    """What an engine has."""

    nodes: tuple[Node, ...]
    waiting: tuple[str, ...] = field(default=())  # the user's jobs that have not started, each with its reason


class Engine(Protocol):
    """A place where the processes of stages run."""

    kind: str  # local, slurm or ray

    def start(self, wish: Wish, *, log: IO[bytes], fork: Fork | None = None) -> Gang:
        """Starts the processes of a stage; their output goes to `log`."""

    def gpus_per_node(self) -> int:
        """The GPUs that a training finds on each node."""

    def capacity(self) -> Capacity:
        """The nodes and what waits for them; StageError if the engine does not answer."""

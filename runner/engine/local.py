"""The engine of this machine."""

from pathlib import Path
from typing import IO, Any

from runner.engine import launch, liveness
from runner.engine.interface import Capacity, Fork, Gang, Node, Wish
from runner.resources import available_cores, gpu_count


class LocalEngine:
    """Processes of this machine, one group at a time."""

    kind = "local"

    def start(self, wish: Wish, *, log: IO[bytes], fork: Fork | None = None) -> Gang:
        """Starts the processes of a stage."""
        if wish.arguments:
            command = launch.plain_command(wish.job, *wish.arguments)
        else:
            command = launch.group_command(wish.job, wish.per_node)
            fork = fork if wish.per_node == 1 else None
        return LocalGang(command, wish.job.parent, log=log, environment=launch.environment_of(wish.threads), fork=fork)

    def gpus_per_node(self) -> int:
        """The GPUs that a training finds here."""
        return gpu_count()

    def capacity(self) -> Capacity:
        """This machine."""
        return Capacity((Node("this machine", "here", available_cores(), gpu_count()),))


class LocalGang(launch.LocalProcess):
    """The processes of a stage on this machine."""

    def __init__(self, command: list[str], scratch: Path, **settings: Any) -> None:
        super().__init__(command, **settings)
        self._scratch = scratch

    def end(self) -> None:
        """Ends what still runs, suspended workers too."""
        super().end()
        liveness.end(self._scratch)

    def waits_for(self) -> None:
        """Nothing."""

    def fault(self) -> None:
        """Nothing that a worker would not tell."""

    def show_stacks(self) -> None:
        """Makes every worker write the stacks of its threads to the log."""
        liveness.show_stacks(self._scratch)

    def facts(self) -> dict[str, Any]:
        """Nothing: this is where runs usually are."""
        return {}

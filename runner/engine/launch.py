"""Starts and ends the processes of a stage on this machine: one worker, forked where that is safe, or several under
`accelerate launch`.

The standard input of the workers is a pipe; they exit when it closes, which also happens when this process dies. Their output
is the key's log, whose open file holds the key's lock. A request to stop is a file in the scratch folder, which a training
checks between steps.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from runner.compiled_code import VARIABLE, compiled_folder
from runner.engine.interface import Fork, Process
from runner.resources import gpu_count
from runner.safe_path import PYTHON, safe_environment

POLL_SECONDS = 0.1
# How long an idle OpenMP thread spins before it sleeps. The default of GNU's library, 300,000 turns, slows down other work.
# Milliseconds per step of a small training on two cores, alone and with a second one beside it (ideal: twice as long):
# 1,000 turns 216 and 392, 2,500 turns 186 and 433, 6,000 turns 191 and 573, 20,000 turns 202 and 1,120.
SPIN_COUNT = "2500"
# glibc returns freed large blocks to the system, and a training frees and allocates hundreds of them per step: 15,000 page
# faults took 11% of its time. With blocks kept and in huge pages of 2 MiB, a small training step takes 160 ms instead of 174
# on two cores, and a decoding step 3.8 ms instead of 4.9. Other C libraries ignore these names.
MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # madvise; no effect where the kernel grants no huge pages
}
MODULE = "runner.execution.worker"
WORKER = [*PYTHON, "-m", MODULE]
LAUNCHER = "accelerate.commands.launch"  # `accelerate launch` without its other commands
ACCELERATE_CONFIG = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO"}  # the flags say the rest
# Variables of a launcher that started this run; the processes of a training get their own values.
LAUNCHER_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|TORCH_NCCL_ASYNC_ERROR_HANDLING"
    r"|ACCELERATE_(MIXED_PRECISION|DYNAMO_\w+|USE_(CPU|FSDP|DEEPSPEED|MEGATRON_LM))"
)
GRACE_SECONDS = 60.0  # from a request to stop until the workers are killed; enough to checkpoint a large model


@dataclass(frozen=True)
class Place:
    """The place of this machine among the nodes of a training."""

    nodes: int
    rank: int  # of this node
    host: str = "127.0.0.1"  # of the node of rank 0
    port: int = 0  # there, at which the processes form their group; 0 takes a free one


ALONE = Place(nodes=1, rank=0)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the variables of the launcher that started this run."""
    return {name: value for name, value in environment.items() if not LAUNCHER_VARIABLES.fullmatch(name)}


def can_fork() -> bool:
    """Whether workers may be forked from a process that has imported torch."""
    return sys.platform == "linux" and gpu_count() == 0


def plain_command(job: Path, *arguments: str) -> list[str]:
    """The command of one worker without a process group."""
    return [*WORKER, str(job), *arguments]


def group_command(job: Path, processes: int, place: Place = ALONE) -> list[str]:
    """The command of `processes` workers per node under `accelerate launch`.

    A config file beside the job replaces the user's own default configuration. A single process needs no launcher, which takes
    two seconds to import torch. `--multi_gpu` is used on CPU too: with ACCELERATE_USE_CPU it starts gloo processes, while
    `--cpu --num_processes N` of accelerate 1.15 silently starts one. The worker asserts its world size. The launchers of all
    nodes meet at the port of the first one; process ranks follow node ranks.
    """
    if processes * place.nodes == 1:
        return plain_command(job)
    config = job.with_name(f"{job.stem}-accelerate-{place.rank}.json")
    config.write_text(json.dumps(ACCELERATE_CONFIG), encoding="utf-8")
    options = ["--config_file", str(config), "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--num_machines", str(place.nodes), "--num_processes", str(processes * place.nodes)]
    options += ["--main_process_port", str(place.port or free_port())]
    if place.nodes > 1:
        options += ["--machine_rank", str(place.rank), "--main_process_ip", place.host, "--same_network"]
    return [*PYTHON, "-m", LAUNCHER, *options, "--multi_gpu", "-m", MODULE, str(job)]


def environment_of(threads: int, *, compiled: Path | None = None) -> dict[str, str]:
    """The environment of workers; `compiled` is the folder of compiled code, by default the user's."""
    defaults = {"GOMP_SPINCOUNT": SPIN_COUNT, **MEMORY}
    fixed = {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads), VARIABLE: str(compiled or compiled_folder())}
    return defaults | safe_environment(without_launcher(os.environ)) | fixed


class LocalProcess:
    """The processes of a stage on this machine. Their standard input is a pipe whose other end is held here."""

    def __init__(
        self, command: list[str], *, log: IO[bytes] | None, environment: dict[str, str], fork: Fork | None = None
    ) -> None:
        """Starts them; a single worker is made by `fork`, if given, and has the server's environment."""
        if LAUNCHER in command and gpu_count() == 0:  # a single worker detects it
            environment = environment | {"ACCELERATE_USE_CPU": "true"}
        self._process, self._write_end = _begun(command, log, environment, fork)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while they run."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; subprocess.TimeoutExpired after `timeout` seconds."""
        return self._process.wait(timeout)

    def end(self) -> None:
        """Ends those that still run."""
        os.close(self._write_end)  # every worker that still runs ends now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)


@contextlib.contextmanager
def started(
    command: list[str], *, log: IO[bytes], environment: dict[str, str], fork: Fork | None = None
) -> Iterator[LocalProcess]:
    """Running processes of this machine; on exit, those that still run are ended."""
    process = LocalProcess(command, log=log, environment=environment, fork=fork)
    try:
        yield process
    finally:
        process.end()


def _begun(command: list[str], log: IO[bytes] | None, environment: dict[str, str], fork: Fork | None) -> tuple[Process, int]:
    """The processes, and the write end of the pipe that is their standard input."""
    read_end, write_end = os.pipe()
    try:
        if fork:
            return fork(command[command.index(MODULE) + 1 :], stdin=read_end, log=log), write_end
        process = subprocess.Popen(command, stdin=read_end, stdout=log, stderr=log, env=environment, start_new_session=True)
        return process, write_end
    except ConnectionError:
        os.close(write_end)  # ends a worker that the server may have forked
        return _begun(command, log, environment, None)
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)


class Polled(Protocol):
    """What `wait` needs of processes."""

    def poll(self) -> int | None:
        """The exit code; None while they run."""


def wait(
    process: Polled,
    *,
    tick: Callable[[], None],
    stopping: Callable[[], bool],
    at_once: Callable[[], bool] = lambda: False,  # whether there is nothing that a stop could wait for
) -> int | None:
    """The exit code of the processes; None if they still run GRACE_SECONDS after a request to stop."""
    deadline: float | None = None
    while (code := process.poll()) is None:
        tick()
        if stopping() and deadline is None:
            deadline = time.monotonic() + (0.0 if at_once() else GRACE_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            return None
        time.sleep(POLL_SECONDS)
    tick()
    return code


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])

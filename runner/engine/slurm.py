"""The engine of a Slurm cluster, by plain `srun`: one task per node, which is a `runner.engine.node`.

Inside an allocation (`sbatch`, `salloc`) a stage is a step of it; elsewhere each stage is a job of its own, which waits its
turn in the queue. Only the commands that every user of Slurm has are used: srun, squeue, sinfo, scancel.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, Any

from runner.engine.interface import Capacity, Fork, Gang, Node, Wish
from runner.engine.launch import without_launcher
from runner.engine.meeting import Meeting
from runner.engine.settings import SlurmSettings
from runner.errors import StageError
from runner.safe_path import PYTHON, safe_environment

ASK_SECONDS = 5.0  # between two questions why a job waits
FIRST_SECONDS = 2.0  # until the first one
ANSWER_SECONDS = 30.0  # for Slurm to answer
END_SECONDS = 8.0  # for the nodes to end after standard input has closed
NODE_FAILED = re.compile(r"[Nn]ode failure on (\S+)")
LOG_BYTES = 1 << 16  # at the end of the log, where srun tells of failed nodes
GPUS = re.compile(r"gpu(?::[^:(,]+)?:(\d+)")


class SlurmEngine:
    """Stages as steps or jobs of Slurm."""

    kind = "slurm"

    def __init__(self, settings: SlurmSettings) -> None:
        """StageError if there is no srun here."""
        if shutil.which("srun") is None:
            raise StageError("engine slurm: expected the command srun, got none; run on a node where Slurm's commands are")
        self._settings = settings

    def start(self, wish: Wish, *, log: IO[bytes], fork: Fork | None = None) -> Gang:
        """Starts a job of as many nodes as the stage needs, or a step of the allocation of this run."""
        return SlurmGang(wish, self._settings, log=log)

    def gpus_per_node(self) -> int:
        """The GPUs that the settings ask for, else those of the allocation."""
        if found := GPUS.search(self._settings.gres or ""):
            return int(found[1])
        return int(os.environ.get("SLURM_GPUS_ON_NODE", "0")) if in_allocation() else 0

    def capacity(self) -> Capacity:
        """The nodes of the partition, and the user's jobs that wait."""
        where = ["--partition", self._settings.partition] if self._settings.partition else []
        if in_allocation():
            where = ["--nodes", os.environ.get("SLURM_JOB_NODELIST", "")]
        lines = dict.fromkeys(_asked(["sinfo", "-N", "-h", *where, "-o", "%N|%T|%c|%G"]).splitlines())
        waiting = _asked(["squeue", "-h", "-u", getpass.getuser(), "-t", "PENDING", "-o", "job %i (%j, %D nodes): %r"])
        return Capacity(tuple(map(_node, lines)), tuple(waiting.splitlines()))


class SlurmGang:
    """The processes of a stage on the nodes of a job or a step, followed through its `srun`."""

    def __init__(self, wish: Wish, settings: SlurmSettings, *, log: IO[bytes]) -> None:
        self._meeting = Meeting(wish.job.parent, wish.nodes)
        self._name = f"stockpot-{self._meeting.name}"
        self._log, self._log_start = Path(log.name), os.fstat(log.fileno()).st_size
        self._asked, self._reason = time.monotonic() - ASK_SECONDS + FIRST_SECONDS, ""
        environment = safe_environment(without_launcher(os.environ))
        self._process = subprocess.Popen(
            self._command(wish, settings),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )

    def _command(self, wish: Wish, settings: SlurmSettings) -> list[str]:
        guard = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []  # a job in the queue ends with its run
        command = [*guard, "srun", f"--nodes={wish.nodes}", f"--ntasks={wish.nodes}", "--ntasks-per-node=1"]
        command += ["--kill-on-bad-exit=1", "--unbuffered", f"--job-name={self._name}"]
        if in_allocation():
            command += ["--overlap"]
        else:
            gres = settings.gres if wish.gpus else settings.cpu_gres
            given = {"partition": settings.partition, "account": settings.account, "time": settings.time, "gres": gres}
            command += [f"--{name}={value}" for name, value in given.items() if value]
            command += [f"--cpus-per-task={settings.cpus}"] if settings.cpus else ["--exclusive"]
            command += settings.options
        command += [*PYTHON, "-m", "runner.engine.node", str(wish.job), "--meeting", self._meeting.name]
        command += ["--nodes", str(wish.nodes), "--per-node", str(wish.per_node), "--code", wish.code]
        return [*command, *(f"--argument={argument}" for argument in wish.arguments)]

    def poll(self) -> int | None:
        """The exit code of srun, which is the highest of the nodes."""
        self._meeting.look()
        return self._process.poll()

    def waits_for(self) -> str | None:
        """Why Slurm has not started the job."""
        if self._meeting.has_begun:
            return None
        if time.monotonic() - self._asked > ASK_SECONDS:
            self._asked = time.monotonic()
            with contextlib.suppress(StageError):
                answer = _asked(["squeue", "-h", "--name", self._name, "-o", "job %i of Slurm, %T: %r"]).strip()
                self._reason = answer or self._reason
        return self._reason

    def fault(self) -> str | None:
        """A node that Slurm lost, that does not take part, or that is silent."""
        with self._log.open("rb") as file:
            file.seek(max(self._log_start, os.fstat(file.fileno()).st_size - LOG_BYTES))
            if found := NODE_FAILED.search(file.read().decode(errors="replace")):
                return f"node {found[1]} failed"
        return self._meeting.silent()

    def end(self) -> None:
        """Closes standard input, on which every node ends; then cancels what is left, also of nodes that come back later."""
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        begun = self._meeting.has_begun
        self._meeting.end()
        left = END_SECONDS if begun else 0.0
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=left)
                break
            left = 3.0
        if not in_allocation() and (number is not None or self._process.returncode):
            with contextlib.suppress(StageError):
                _asked(["scancel", "--quiet", "--user", getpass.getuser(), "--name", self._name])

    def show_stacks(self) -> None:
        """Asks the nodes for the stacks of their processes."""
        self._meeting.show_stacks()

    def facts(self) -> dict[str, Any]:
        """Engine, nodes and job."""
        return {"engine": {"kind": "slurm", "nodes": self._meeting.names()}}


def in_allocation() -> bool:
    """Whether this run has nodes of its own, from sbatch or salloc."""
    return "SLURM_JOB_ID" in os.environ


def _node(line: str) -> Node:
    name, state, cores, gres = line.split("|")
    gpus = GPUS.search(gres)
    return Node(name, state, int(cores.rstrip("+") or 0), int(gpus[1]) if gpus else 0)


def _asked(command: list[str]) -> str:
    """What a command of Slurm prints; StageError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StageError(f"engine slurm: {command[0]} did not answer: {error}") from error
    if done.returncode:
        raise StageError(f"engine slurm: {command[0]} failed: {done.stderr.strip()}")
    return done.stdout

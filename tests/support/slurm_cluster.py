"""A Slurm cluster of a few nodes on this machine: its own daemons and key in a network namespace, for the tests of a file.

with slurm_cluster(folder, nodes=3) as cluster:
    subprocess.run([*cluster.inside, "srun", "hostname"], env=cluster.environment)
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

COMMANDS = ("slurmctld", "slurmd", "munged", "srun", "unshare", "nsenter", "ip")
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool.%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.%n.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd.%n.log
SlurmctldPort=36817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
InactiveLimit=0
MinJobAge=300
JobRequeue=1
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
"""


def missing() -> str | None:
    """Why no cluster can run here."""
    if absent := [command for command in COMMANDS if shutil.which(command) is None]:
        return f"no {', '.join(absent)} here (apt-get install slurmctld slurmd munge slurm-client)"
    return "root starts the daemons" if os.geteuid() else None


@dataclass(frozen=True)
class SlurmCluster:
    """The running cluster."""

    folder: Path
    inside: tuple[str, ...]  # before a command
    environment: dict[str, str]
    daemons: "list[subprocess.Popen[bytes]]"

    def ask(self, *words: str) -> str:
        done = subprocess.run([*self.inside, *words], env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout

    def processes_of(self, node: str) -> list[psutil.Process]:
        """The daemon of a node and all that it started."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment, words = process.environ(), process.cmdline()
                if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                if environment.get("SLURMD_NODENAME") == node:
                    found |= {process, *(parent for parent in process.parents() if "slurmstepd" in parent.name())}
                elif words[:1] == ["slurmd"] and words[-1] == node:
                    found.add(process)
        return list(found)

    def cut_power(self, node: str) -> None:
        """Ends everything on a node at once."""
        processes = self.processes_of(node)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def start_node(self, node: str) -> None:
        self.daemons.append(_daemon([*self.inside, "slurmd", "-D", "-N", node], self.environment))


def _daemon(command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)


@contextlib.contextmanager
def slurm_cluster(folder: Path, *, nodes: int = 2) -> Iterator[SlurmCluster]:
    """A cluster whose nodes have the names n1, n2, ... and two cores each; pytest skips where Slurm is not installed."""
    if why := missing():
        pytest.skip(why)
    (folder / "state").mkdir(parents=True)
    names = [f"n{number}" for number in range(1, nodes + 1)]
    lines = [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={37000 + number} CPUs=2 RealMemory=4000 State=UNKNOWN"
        for number, name in enumerate(names, start=1)
    ]
    lines.append(f"PartitionName=main Nodes={','.join(names)} Default=YES MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text(CONFIG.format(run=folder) + "\n".join(lines) + "\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    namespace = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "ip link set lo up && ip addr add 192.0.2.99/32 dev lo && exec sleep 100000"],
        env=environment,
        start_new_session=True,
    )
    inside = ("nsenter", f"--net=/proc/{namespace.pid}/ns/net")
    cluster = SlurmCluster(folder, inside, environment, [])
    munge = [
        f"--{name}={folder}/munge{end}" for name, end in (("socket", ".socket"), ("key-file", ".key"), ("pid-file", ".pid"))
    ]
    munge += [f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log", "--force", "--foreground"]
    cluster.daemons.append(_daemon(["munged", *munge], environment))
    try:
        _until(lambda: (folder / "munge.socket").exists())
        _until(lambda: "192.0.2.99" in subprocess.run([*inside, "ip", "addr"], capture_output=True, text=True).stdout)
        cluster.daemons.append(_daemon([*inside, "slurmctld", "-D"], environment))
        for name in names:
            cluster.start_node(name)
        _until(lambda: _idle(cluster) == nodes)
        yield cluster
    finally:
        for name in names:
            cluster.cut_power(name)
        for process in [*cluster.daemons, namespace]:
            process.kill()
            process.wait()
        for process in psutil.process_iter():  # slurmctld's helper
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("SLURM_CONF") == environment["SLURM_CONF"] and process.ppid() == 1:
                    process.kill()


def _idle(cluster: SlurmCluster) -> int:
    done = subprocess.run(
        [*cluster.inside, "sinfo", "-N", "-h", "-o", "%T"], env=cluster.environment, capture_output=True, text=True
    )
    return done.stdout.split().count("idle")


def _until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)

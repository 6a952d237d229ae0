"""A node of a stage: what a cluster starts once per machine, `python -P -m runner.engine.node JOB ...`.

It checks that the code is the run's and that the cache is shared, starts the processes of this machine under
`accelerate launch` with its rank, and ends them when standard input, a pipe from the run, closes.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from runner.engine import launch, liveness
from runner.engine.interface import REFUSAL, REFUSED
from runner.engine.job import Job
from runner.engine.meeting import BEAT_SECONDS, Seat
from runner.planning.code_digest import code_digest
from runner.resources import available_cores
from runner.stages import stage_kinds

SHARED_SECONDS = 10.0  # for a new folder of one machine to appear on another that shares the disk
MEET_SECONDS = 120.0  # for the node of rank 0 to say where the launchers meet
POLL_SECONDS = 0.1
ORPHANED = 4


class Refused(Exception):  # noqa: N818  # no error here: the run is told
    """This node cannot take part; the message says why."""


def main() -> int:
    """Takes part in a stage; returns the exit code of its processes."""
    options = _options()
    name = os.environ.get("SLURMD_NODENAME") or os.environ.get("STOCKPOT_MACHINE") or socket.gethostname()
    os.environ.setdefault("STOCKPOT_MACHINE", name)  # under which the workers register
    seat = Seat(options.job.parent, options.meeting, options.rank, name)
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ending.set())
    threading.Thread(target=_watch_run, args=[ending], daemon=True, name="run-watch").start()
    try:
        return _take_part(options, seat, ending)
    except Refused as refusal:
        print(f"{REFUSAL}node {name}: {refusal}", file=sys.stderr, flush=True)
        return REFUSED


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--meeting", required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--per-node", type=int, required=True)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("SLURM_PROCID", "0")))
    parser.add_argument("--code", required=True)
    parser.add_argument("--argument", action="append", default=[])
    return parser.parse_args()


def _take_part(options: argparse.Namespace, seat: Seat, ending: threading.Event) -> int:
    """Checks, meets the other nodes, and follows the processes of this one."""
    if not seat.is_seen(SHARED_SECONDS):
        raise Refused(
            f"{seat.folder}: expected the cache of the run, got no such folder; the cache (--cache) has to be one folder "
            "at one "
            "path that all nodes share"
        )
    job = Job.read(options.job)
    if (found := code_digest(stage_kinds()[job.kind])) != options.code:
        raise Refused(
            f"expected the code of the run ({options.code[:12]}), got {found[:12]}; install the same version on all nodes"
        )
    seat.beat()
    place = launch.ALONE if options.nodes == 1 else _met(options, seat, ending)
    if place is None:
        return ORPHANED
    if options.argument:
        command = launch.plain_command(options.job, *options.argument)
    else:
        command = launch.group_command(options.job, options.per_node, place)
    environment = launch.environment_of(max(1, available_cores() // options.per_node))
    process = launch.LocalProcess(command, log=None, environment=environment)
    try:
        return _followed(process, seat, ending, scratch=options.job.parent)
    finally:
        process.end()
        liveness.end(options.job.parent)
        seat.leave()


def _followed(process: launch.LocalProcess, seat: Seat, ending: threading.Event, *, scratch: Path) -> int:
    """The exit code of the processes of this node; ORPHANED if the run wants them no longer."""
    beaten, shown = time.monotonic(), False
    while (code := process.poll()) is None:
        if ending.wait(POLL_SECONDS):
            return ORPHANED
        if time.monotonic() - beaten > BEAT_SECONDS:
            beaten = time.monotonic()
            if not seat.beat():
                return ORPHANED
            if not shown and seat.wants_stacks():
                shown = True
                liveness.show_stacks(scratch)
    return code if code >= 0 else 128 - code


def _met(options: argparse.Namespace, seat: Seat, ending: threading.Event) -> launch.Place | None:
    """The place of this node; None if the run ends before."""
    if options.rank == 0:
        host, port = own_address(), launch.free_port("")
        seat.publish(host, port)
        return launch.Place(options.nodes, 0, host, port)
    deadline = time.monotonic() + MEET_SECONDS
    while (main := seat.main()) is None:
        if ending.wait(0.2) or not seat.beat():
            return None
        if time.monotonic() > deadline:
            raise Refused(f"expected the address of the first node within {MEET_SECONDS:.0f} s, got none")
    return launch.Place(options.nodes, options.rank, *main)


def own_address() -> str:
    """An address of this machine that others reach: what its name stands for, else that of the way to elsewhere, else that of
    any interface.
    """
    found = [address for address in _addresses_of_name() if not _is_loopback(address)]
    if found:
        return found[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            pass
    import psutil

    others = (
        interface.address
        for interfaces in psutil.net_if_addrs().values()
        for interface in interfaces
        if interface.family == socket.AF_INET and not _is_loopback(interface.address)
    )
    return next(others, "127.0.0.1")


def _addresses_of_name() -> list[str]:
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def _watch_run(ending: threading.Event) -> None:
    """Sets `ending` when standard input closes."""
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass
    ending.set()


if __name__ == "__main__":
    sys.exit(main())

"""A group of processes as `accelerate launch` makes one, forked from a process that has imported torch already.

Tests of what a group computes start many of these; that trainings of a recipe start under `accelerate launch` has tests of its
own.
"""

import contextlib
import os
import signal
import socket
import threading

import torch

SECONDS = 1.0  # for the others to end after the first that failed


def become_one_of(processes: int) -> None:
    """Returns in each of `processes` new processes, with its place in the group; this process waits for them, and exits with
    an error if one does.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    running: set[int] = set()
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            place = group | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true"}
            os.environ.update({name: str(value) for name, value in place.items()})
            torch.set_num_threads(1)
            return
        running.add(pid)

    def end() -> None:
        for other in tuple(running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)

    failed = False
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not failed:
            failed = True
            threading.Timer(SECONDS, end).start()
    os._exit(int(failed))

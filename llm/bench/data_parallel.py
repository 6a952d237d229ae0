"""What sharing a step costs: by one process with all threads, and by two that have half of them each, over gloo.

Each candidate is a group of processes of its own that takes a step when it is told to and waits on a pipe otherwise, so that
they can take turns. All compute on the CPU, also where there is a GPU: what is measured is the way over main memory.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch

from llm.bench.implementations import StockpotTraining, build_stockpot_model
from llm.bench.timing import interleaved, ratio
from llm.bench.workload import Workload
from llm.errors import InputError
from llm.training.distributed.process_group import ProcessGroup

TOGETHER = 2
# Processes, and how they share a step.
CANDIDATES: dict[str, tuple[int, Literal["ddp", "fsdp"]]] = {
    "one": (1, "ddp"),
    "ddp": (TOGETHER, "ddp"),
    "fsdp": (TOGETHER, "fsdp"),
}


def measure_data_parallel(workload: Workload, *, seconds: float) -> dict[str, Any]:
    """Speeds by candidate, and each one's as a share of that of one process."""
    if workload.cores < TOGETHER:
        raise InputError(f"processes: expected at least {TOGETHER} cores, got {workload.cores}")
    with contextlib.ExitStack() as stack:
        steps = {name: stack.enter_context(_training(workload, *layout)) for name, layout in CANDIDATES.items()}
        timings = interleaved(steps, seconds=seconds, device=torch.device("cpu"))
    return {
        "threads": workload.cores,  # of all processes of a candidate together
        "candidates": {
            name: {
                "processes": processes,
                "tokens_per_second": workload.tokens_per_step / timings[name].median,
                "rounds": timings[name].rounds,
                "share_of_one": ratio(timings, "one", name),
            }
            for name, (processes, _) in CANDIDATES.items()
        },
    }


class _Steps:
    """Processes that take one step, all together, at each call."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def tell(self, text: str) -> None:
        """Send a line to all."""
        for process in self._processes:
            assert process.stdin is not None
            print(text, file=process.stdin, flush=True)

    def __call__(self) -> None:
        self.tell("step")
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise InputError(f"processes: one of {len(self._processes)} ended; what it said stands above")


@contextlib.contextmanager
def _training(workload: Workload, processes: int, strategy: str) -> Iterator[_Steps]:
    """The processes of a candidate, started; on leaving, ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    shared["OMP_NUM_THREADS"] = str(workload.cores // processes)
    command = [sys.executable, "-m", "llm.bench.data_parallel", strategy]
    started: list[subprocess.Popen[str]] = []
    try:
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment = shared | (place if processes > 1 else {})  # with these, one alone would be a group, too
            started.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
            )
        steps = _Steps(started)
        steps.tell(workload.model_dump_json())
        yield steps
    finally:
        for process in started:
            process.kill()  # nothing of it is wanted any more
            process.communicate()


def main() -> None:
    """One process of a candidate: the first line of standard input has the workload, each other one asks for a step."""
    (strategy,) = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries say is no answer
    workload = Workload.model_validate_json(sys.stdin.readline())
    named: Literal["ddp", "fsdp"] = "fsdp" if strategy == "fsdp" else "ddp"
    training = StockpotTraining(
        workload, build_stockpot_model(workload), optimizer=workload.optimizer, group=ProcessGroup(), strategy=named
    )
    for _ in sys.stdin:
        training.step()
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()

"""What data parallelism costs: one process with all threads, and two with half of them each, over gloo.

Each candidate is a group of processes of its own that takes a step when asked and otherwise waits on a pipe, so that they can
take turns. All compute on the CPU, even where there is a GPU: what is measured is communication through main memory.
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

TOGETHER = 2  # processes
# Processes, and their strategy.
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
    """A group of processes that takes one step at each call."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def send(self, text: str) -> None:
        """Send a line to all processes."""
        for process in self._processes:
            assert process.stdin is not None
            print(text, file=process.stdin, flush=True)

    def __call__(self) -> None:
        self.send("step")
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise InputError(f"processes: one of {len(self._processes)} ended; its output is above")


@contextlib.contextmanager
def _training(workload: Workload, processes: int, strategy: str) -> Iterator[_Steps]:
    """The processes of a candidate, started; they end with the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    shared["OMP_NUM_THREADS"] = str(workload.cores // processes)
    command = [sys.executable, "-P", "-m", "llm.bench.data_parallel", strategy]
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
        steps.send(workload.model_dump_json())
        yield steps
    finally:
        for process in started:
            process.kill()  # its state is not needed
            process.communicate()


def main() -> None:
    """One process of a candidate: the first line of standard input is the workload, each other line asks for a step."""
    (strategy,) = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    workload = Workload.model_validate_json(sys.stdin.readline())
    named: Literal["ddp", "fsdp"] = "fsdp" if strategy == "fsdp" else "ddp"
    training = StockpotTraining(workload, build_stockpot_model(workload), group=ProcessGroup(), strategy=named)
    for _ in sys.stdin:
        training.step()
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()

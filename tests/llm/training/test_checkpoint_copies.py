"""A checkpoint is copied to machines that do not share the disk of the first one, and only to those."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from llm.training.checkpoint import TrainingState, newest, read, write
from runner.engine.launch import free_port

PROCESS = """
import sys
from pathlib import Path
from llm.training.checkpoint import copy_to_machines
from llm.training.distributed.process_group import ProcessGroup
folder, path = map(Path, sys.argv[1:])
print(copy_to_machines(path, folder, ProcessGroup()))
"""


def test_a_checkpoint_is_copied_to_the_machine_that_lacks_it_and_to_no_other(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    weights = {"weight": torch.arange(12.0)}
    path = write(folders[0], TrainingState(weights, {"weight/moment": torch.ones(3)}, {"step": 7}), kept=2)
    other = TrainingState(weights, {}, {"step": 7})
    write(folders[1], other, kept=2)  # of the same name, and not the same
    before = path.stat().st_mtime_ns
    port = str(free_port())
    ranks = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
        "LOCAL_RANK": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder), str(path)],
            env={**os.environ, **ranks, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    told = [process.communicate()[0].strip() for process in processes]
    assert told == [str(folder / path.name) for folder in folders]
    assert path.stat().st_mtime_ns == before
    found, damaged = newest(folders[1])
    assert found is not None and not damaged
    state = read(found)
    assert torch.equal(state.weights["weight"], weights["weight"])
    assert torch.equal(state.optimizer["weight/moment"], torch.ones(3))

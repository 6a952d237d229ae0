"""Between the processes of a training: what they exchange is never unpickled, and names no file outside."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from llm.training.checkpoint import _plain
from runner.safe_path import PYTHON, safe_environment

PROCESS = """
import json, sys
import torch.distributed as dist
from torch.distributed import distributed_c10d

def refuse(*arguments, **options): raise RuntimeError("unpickled")

distributed_c10d._tensor_to_object = distributed_c10d._object_to_tensor = refuse
from llm.training.distributed.process_group import ProcessGroup
group = ProcessGroup(timeout_minutes=1)
assert group.size == 2
values = [True, None, "name", [1, 2.5], {"a": [None]}]
for value in values:
    assert group.from_main(value if group.is_main else "another") == value
assert group.bytes_from_main(bytes(range(256)) * 5000 if group.is_main else b"") == bytes(range(256)) * 5000
assert group.bytes_from_main(b"") == b""
dist.destroy_process_group()
"""


def test_processes_of_a_training_exchange_no_pickles() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = safe_environment(dict(os.environ)) | {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*PYTHON, "-c", PROCESS], env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    told = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], told


def test_no_function_for_pickled_objects_is_called() -> None:
    assert dist.broadcast_object_list  # the names below are torch's
    root = Path(__file__).parents[2]
    names = (
        "object_list",
        "gather_object",
        "pickle.load",
        "torch.load(",
        "allow_pickle=True",
        "yaml.load(",
        "shelve",
        "joblib",
    )
    found = [
        f"{path}: {name}"
        for folder in ("llm", "runner")
        for path in (root / folder).rglob("*.py")
        for name in names
        if name in path.read_text(encoding="utf-8")
    ]
    assert found == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "..", "a/b", "a\0b", "x\n"])
def test_a_checkpoint_of_the_main_process_has_plain_names(name: str) -> None:
    with pytest.raises(ValueError, match="expected plain names"):
        _plain(name)

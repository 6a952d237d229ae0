"""Real processes over gloo share the batches of an inference, and one that fails ends them all."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "support" / "models" / "inference_group.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, by case."""
    folder = tmp_path_factory.mktemp("group")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)], env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    assert [process.wait() for process in running] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_processes_share_batches_and_all_have_all_results(two: list[dict[str, Any]]) -> None:
    assert [one["none"]["worked"] for one in two] == [[[4, 0], [3], [7]], [[1, 5], [2, 6]]]
    for one in two:
        assert one["none"]["found"] == [[index, 100 + index] for index in range(8)]
        assert (one["none"]["tokens"], one["none"]["done"], one["none"]["alone"]) == (8, [4, 7, 8], "by 0")


@pytest.mark.parametrize(("case", "row"), [("first", 3), ("second", 2)])
def test_an_error_in_one_process_ends_all_of_them_with_its_message(two: list[dict[str, Any]], case: str, row: int) -> None:
    for one in two:
        assert one[case]["error"] == f"rows.jsonl:{row}: expected a label, got none"
        assert len(one[case]["worked"]) == 2

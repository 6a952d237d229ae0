"""The fork server. What its workers do is tested in test_run.py and test_faults.py."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from runner.engine import launch
from runner.execution.fork_server import ForkedWorker, ForkServer

pytestmark = pytest.mark.skipif(not launch.can_fork(), reason="workers are forked only on Linux, and where there is no GPU")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    """A server with one quick module and one that does not exist."""
    running = ForkServer(["no_such_module", "wave"], place=tmp_path, environment=dict(os.environ))
    with closing(running):
        yield running


def begin(server: ForkServer, folder: Path, job: Path, **more: Any) -> ForkedWorker:
    """A worker for `job`, with its log in `folder` and a standard input that stays open."""
    read_end, _ = os.pipe()
    with (folder / "log").open("ab") as log:
        return server.start(["wave", "no_such_module"], [str(job)], stdin=read_end, log=log, **more)


def waiting_job(folder: Path) -> Path:
    """A job file that blocks its worker until it is written."""
    job = folder / "job.json"
    os.mkfifo(job)
    return job


def test_each_worker_has_its_own_log_and_exit_code(server: ForkServer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        worker = begin(server, tmp_path / name, tmp_path / f"{name}.json")
        assert worker.wait(timeout=30) == worker.poll() == 1
        log = (tmp_path / name / "log").read_text()
        assert "Traceback" in log and f"No such file or directory: '{tmp_path / name}.json'" in log


def test_a_worker_leads_a_session_and_reports_the_signal_that_ended_it(server: ForkServer, tmp_path: Path) -> None:
    worker = begin(server, tmp_path, waiting_job(tmp_path))
    assert worker.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(timeout=0.2)
    assert os.getsid(worker.pid) == worker.pid
    os.killpg(worker.pid, signal.SIGTERM)
    assert worker.wait(timeout=30) == -signal.SIGTERM


def test_without_its_server_a_worker_counts_as_killed_and_no_new_one_starts(server: ForkServer, tmp_path: Path) -> None:
    job = waiting_job(tmp_path)
    worker = begin(server, tmp_path, job)
    process = psutil.Process(worker.pid)
    parent = process.parent()
    assert parent and str(tmp_path) in parent.cmdline()
    parent.kill()
    assert worker.wait(timeout=30) == -signal.SIGKILL
    for _ in range(2):
        with pytest.raises(ConnectionError):
            begin(server, tmp_path, job)
    process.kill()


def test_a_server_ends_with_its_run(tmp_path: Path) -> None:
    server = ForkServer([], place=tmp_path, environment=dict(os.environ))
    worker = begin(server, tmp_path, tmp_path / "job.json")
    assert worker.wait(timeout=30) == 1
    server._connection.close()  # as the end of the run does
    assert server._process.wait(timeout=30) == 0

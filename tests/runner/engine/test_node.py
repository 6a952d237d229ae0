"""A node of a stage, started by hand as a cluster starts it, and the folder in which it and its run tell each other things."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from watched_processes import wait_for

from runner.engine import meeting
from runner.engine.interface import REFUSED
from runner.engine.job import Job
from runner.engine.meeting import SILENT_SECONDS, Meeting, Seat
from runner.engine.node import ORPHANED, own_address
from runner.planning.code_digest import code_digest
from runner.stages import stage_kinds

JOB = Job("text", "corpus", {}, "", {}, {}, "", {}, processes=1, cores=1, data={})


def node(job: Path, name: str, *, rank: int = 0, nodes: int = 1, code: str = "") -> "subprocess.Popen[str]":
    """A node that holds its place in the meeting `name`."""
    job.parent.mkdir(parents=True, exist_ok=True)
    JOB.write(job)
    command = [sys.executable, "-P", "-m", "runner.engine.node", str(job), "--meeting", name, "--rank", str(rank)]
    command += ["--nodes", str(nodes), "--per-node", "1", "--code", code or code_digest(stage_kinds()["corpus"])]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True, env={**os.environ, "STOCKPOT_MACHINE": f"n{rank}"})


def test_a_node_with_other_code_takes_no_part(tmp_path: Path) -> None:
    run = Meeting(tmp_path, 1)
    refused = node(tmp_path / "job.json", run.name, code="f" * 64)
    _, errors = refused.communicate()
    assert refused.returncode == REFUSED
    assert "stockpot: node n0: expected the code of the run (ffffffffffff), got " in errors


def test_a_node_that_does_not_share_the_cache_takes_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Meeting(tmp_path / "here", 1)
    refused = node(tmp_path / "there" / "job.json", run.name)
    _, errors = refused.communicate()
    assert refused.returncode == REFUSED
    assert f"node n0: {tmp_path / 'there'}" in errors and "expected the cache of the run, got no such folder" in errors


@pytest.mark.parametrize("ending", ["standard input closes", "the folder is gone"])
def test_a_node_ends_when_its_run_does(tmp_path: Path, ending: str) -> None:
    run = Meeting(tmp_path, 2)
    waiting = node(tmp_path / "job.json", run.name, rank=1, nodes=2)  # for the address of the first
    wait_for(lambda: (run.look(), run.has_begun)[1])
    assert run.names() == ["n1"]
    if ending == "standard input closes":
        assert waiting.stdin
        waiting.stdin.close()
    else:
        run.end()
    assert waiting.wait(60) == ORPHANED
    if waiting.stdin and not waiting.stdin.closed:
        waiting.stdin.close()
    assert waiting.stderr
    waiting.stderr.close()


def test_a_node_is_silent_once_its_beats_stop_and_not_after_it_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(meeting.time, "monotonic", lambda: now)
    run = Meeting(tmp_path, 2)
    first, second = (Seat(tmp_path, run.name, rank, f"n{rank}") for rank in range(2))
    assert first.beat() and second.beat()
    for _ in range(20):
        now += 3.0
        first.beat()
        run.look()
    assert run.silent() == f"node n1 has not answered for {57:.0f} s"
    second.beat()
    now += 3.0
    run.look()
    assert run.silent() is None
    first.leave()
    second.leave()
    now += 10 * SILENT_SECONDS
    run.look()
    now += 10 * SILENT_SECONDS
    run.look()
    assert run.silent() is None
    run.end()
    assert not first.beat()


def test_a_run_that_was_suspended_does_not_count_the_time_as_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(meeting.time, "monotonic", lambda: now)
    run = Meeting(tmp_path, 1)
    Seat(tmp_path, run.name, 0, "n0").beat()
    run.look()
    for _ in range(3):
        now += 3600.0
        run.look()
    assert run.silent() is None


def test_nodes_meet_where_the_first_one_says(tmp_path: Path) -> None:
    run = Meeting(tmp_path, 2)
    first, second = (Seat(tmp_path, run.name, rank, f"n{rank}") for rank in range(2))
    assert second.main() is None
    first.publish(own_address(), 1234)
    assert second.main() == (own_address(), 1234)
    assert not second.wants_stacks()
    run.show_stacks()
    assert second.wants_stacks()
    later = Meeting(tmp_path, 2)
    assert not first.beat(), "an earlier meeting is over"
    assert later.name != run.name

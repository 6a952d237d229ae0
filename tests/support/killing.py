"""Kills a run at random times: the parent, a worker, or both, by any signal that ends a process.

After each kill the same command runs again. No process may stay, and the exit code must say that the run ended, failed or was
interrupted. One seed decides every choice; the exact moment depends on the machine.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("parent", "worker", "both")
DONE, FAILED, INTERRUPTED = 0, 3, 130  # exit codes of a run
END_SECONDS = 180.0  # until processes that should end count as hanging, on a busy machine


@dataclass
class Figures:
    """The kills and their outcomes."""

    kills: Counter[str] = field(default_factory=Counter)  # by target and signal
    during: Counter[str] = field(default_factory=Counter)  # by the kind of stage that ran
    codes: Counter[int] = field(default_factory=Counter)  # exit codes of the killed runs
    finished: int = 0  # times that the recipe finished


class Victim:
    """A recipe, its options, and the cache that its runs share."""

    def __init__(self, recipe: Path, cache: Path, *options: str) -> None:
        self.recipe, self.cache, self.options = recipe, cache, options
        self.output = cache.with_suffix(".output")  # by the last run

    def command(self, verb: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "runner.cli", verb, str(self.recipe), *self.options, *more, "--cache", str(self.cache)]

    def start(self) -> "subprocess.Popen[bytes]":
        with self.output.open("wb") as output:
            return subprocess.Popen(self.command("run"), stdout=output, stderr=output, start_new_session=True)

    def run(self) -> None:
        done = subprocess.run(self.command("run"), capture_output=True, text=True)
        assert done.returncode == DONE, done.stderr

    def digests(self) -> dict[str, str]:
        """The digest of each stage's artifact; all must be finished."""
        plan = json.loads(subprocess.run(self.command("plan", "--json"), capture_output=True, check=True).stdout)
        assert {stage["state"] for stage in plan["stages"]} == {"cached"}, plan
        records = {stage["name"]: Path(stage["path"]) / "record.json" for stage in plan["stages"]}
        return {name: json.loads(record.read_text())["digest"] for name, record in records.items()}

    def assert_sound(self) -> None:
        """Asserts that nothing is damaged or unfinished."""
        command = [sys.executable, "-m", "runner.cli", "verify", "--cache", str(self.cache)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == DONE, done.stderr
        assert not list((self.cache / "work").iterdir())

    def working_on(self) -> str:
        """The kind of the stage in progress."""
        works = [path.name.partition("-")[0] for path in (self.cache / "work").glob("*-*")]
        return " and ".join(sorted(works)) or "nothing"

    def processes(self) -> list[psutil.Process]:
        """The processes whose command line names the cache."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.cache) in " ".join(process.cmdline()):
                    found.append(process)
        return found


def torture(victim: Victim, *, kills: int, seed: int, longest: float, expected: dict[str, str]) -> Figures:
    """Kills runs of `victim` `kills` times, each within `longest` seconds of its start, and then lets it finish.

    A finished recipe must have the digests `expected`; if it finishes too early, it starts again with an empty cache.
    """
    choose, figures = random.Random(seed), Figures()
    process = victim.start()
    while figures.kills.total() < kills:
        target, number = choose.choice(TARGETS), choose.choice(SIGNALS)
        delay, pick = choose.uniform(0, longest), choose.random()
        below = list[psutil.Process]()
        if not _ends(process, within=delay):
            below = psutil.Process(process.pid).children(recursive=True)
            figures.during[victim.working_on()] += 1
            hit = [below[int(pick * len(below))].pid] if below and target != "parent" else []
            hit += [process.pid] if target != "worker" or not below else []
            for pid in hit:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            figures.kills[f"{target if below else 'parent'}, {number.name}"] += 1
            if process.pid not in hit and not _ends(process, within=longest):
                continue  # only its tracker died, or it retried: the next kill hits the same run
        assert _ends(process, within=END_SECONDS), f"after {target} {number.name}: it still runs; {figures}"
        figures.codes[process.returncode] += 1
        _assert_it_ended_well(process.returncode, number, victim.output.read_text(errors="replace"))
        alive = psutil.wait_procs([*below, *victim.processes()], timeout=END_SECONDS)[1]
        assert not alive, f"after {target} {number.name}: {alive}"
        if process.returncode == DONE:
            _assert_finished(victim, expected, figures)
            if figures.kills.total() < kills:
                shutil.rmtree(victim.cache)
        process = victim.start()
    process.wait()
    victim.run()
    _assert_finished(victim, expected, figures)
    return figures


def _ends(process: "subprocess.Popen[bytes]", *, within: float) -> bool:
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        return False
    return True


def _assert_finished(victim: Victim, expected: dict[str, str], figures: Figures) -> None:
    assert victim.digests() == expected, figures
    victim.assert_sound()
    figures.finished += 1


def _assert_it_ended_well(code: int, number: signal.Signals, output: str) -> None:
    """A signal that arrives before the program handles it ends it like any Python process."""
    early = code == -number or (number == signal.SIGINT and "KeyboardInterrupt" in output)
    assert early or (code in (DONE, FAILED, INTERRUPTED) and "Traceback (most recent call last)" not in _own(output)), output


def _own(output: str) -> str:
    """The run's own output, without the end of a killed worker's log."""
    return output.partition("the end of ")[0]

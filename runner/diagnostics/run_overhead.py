"""Measures what a run costs besides its stages. These are not tests, because the results depend on the machine.

    python -m runner.diagnostics.run_overhead cached [--rounds 10] [--cache DIR]
    python -m runner.diagnostics.run_overhead live-view [RECIPE] [--stage base] [--rounds 3]

`cached` is the time of doing nothing: a fully cached quickstart, `dvc repro` of as many trivial stages, and a plan of 1,000
stages, each called as a user calls it. They take turns, so that other load on the machine affects all of them; the ratio is
the median over rounds. DVC is the one on PATH, else it is installed into a temporary environment. The quickstart runs first if
it is not in the cache yet. Prints JSON.

`live-view` is the processor time of the process that the user started, which draws the view and waits for the workers, as a
share of all cores, from the first report of a training to its last. The cache is empty, the terminal has 120 columns.
"""

import argparse
import contextlib
import json
import os
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import termios
import time
import venv
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from runner.cache.store import Store
from runner.graph import identity, inputs_of, key_of
from runner.recipe.recipe import load_recipe
from runner.resources import available_cores
from runner.safe_path import PYTHON

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
RUN = [*PYTHON, "-m", "runner.cli"]
MODELS = 333  # of the plan, with three stages each, over one corpus
DVC_SHARE, PLAN_SECONDS = 0.5, 1.0  # limits: of a fully cached quickstart, of DVC's time; and of the plan
VIEW_SHARE = 0.01  # limit of the live view, of the processor time of the run
WARM_UP = 2  # rounds that are not counted


def main() -> int:
    """Measures and prints; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description="What a run costs besides its stages.")
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("cached", help="a fully cached quickstart and a plan of 1,000 stages, compared with DVC")
    sub.add_argument("--rounds", type=int, default=10)
    sub.add_argument("--cache", type=Path, default=ROOT / "cache", help="of the quickstart (default: that of the project)")
    sub.set_defaults(measure=lambda options: measure_cached(options.cache, options.rounds))
    sub = commands.add_parser("live-view", help="the live view during a training")
    sub.add_argument("recipe", nargs="?", type=Path, default=QUICKSTART)
    sub.add_argument("--stage", default="base", help="a stage that trains")
    sub.add_argument("--rounds", type=int, default=3)
    sub.set_defaults(measure=lambda options: measure_live_view(options.recipe, options.stage, options.rounds))
    options = parser.parse_args()
    return 0 if options.measure(options) else 1


def measure_cached(cache: Path, rounds: int) -> bool:
    """Prints the seconds of quickstart, DVC and plan; whether they are within the limits."""
    with tempfile.TemporaryDirectory(prefix="stockpot-dvc-") as name:
        folder = Path(name)
        quickstart = [*RUN, "run", str(QUICKSTART), "--cache", str(cache)]
        call(quickstart)  # makes what is not in the cache yet
        stages = len(load_recipe(QUICKSTART).stages)
        dvc = dvc_command(folder / "venv")
        pipeline(folder / "few", dvc, stages)
        plan = [*RUN, "plan", str(many_stages(folder / "many")), "--cache", str(folder / "many" / "cache"), "--json"]
        states = [stage["state"] for stage in json.loads(call(plan))["stages"]]
        assert states == ["cached"] * (1 + 3 * MODELS)
        found = in_turns(
            {
                "quickstart": lambda: call(quickstart),
                "dvc": lambda: call([*dvc, "repro", "--quiet"], folder / "few"),
                "plan": lambda: call(plan),
            },
            rounds,
        )
        version = call([*dvc, "--version"]).strip()
    share = statistics.median(ours / theirs for ours, theirs in zip(found["quickstart"], found["dvc"], strict=True))
    seconds = {name: statistics.median(times) for name, times in found.items()}
    result = {"stages": stages, "dvc_version": version, "seconds": seconds, "quickstart_of_dvc": share, "rounds": found}
    print(json.dumps(result, indent=2))
    return share < DVC_SHARE and seconds["plan"] < PLAN_SECONDS


def in_turns(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; the order is reversed from round to round."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-WARM_UP, rounds):
        for name in list(candidates)[:: 1 if number % 2 else -1]:
            begun = time.perf_counter()
            candidates[name]()
            if number >= 0:
                found[name].append(time.perf_counter() - begun)
    return found


def call(command: list[str], folder: Path = ROOT) -> str:
    """Runs a command that must succeed, and returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as pip keeps DVC's bytecode, ours may be kept
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def dvc_command(folder: Path) -> list[str]:
    """The command `dvc`, installed into `folder` if it is not on PATH."""
    if path := shutil.which("dvc"):
        return [path]
    venv.create(folder, with_pip=True)
    call([str(folder / "bin" / "pip"), "install", "--quiet", "dvc"])
    return [str(folder / "bin" / "dvc")]


def pipeline(folder: Path, dvc: list[str], stages: int) -> None:
    """Makes and runs a pipeline of trivial stages, each of which reads the output of the one before."""
    folder.mkdir()
    (folder / "file-0").write_text("begin\n")
    files = [f"file-{number}" for number in range(stages + 1)]
    table = {f"stage-{new}": {"cmd": f"cp {old} {new}", "deps": [old], "outs": [new]} for old, new in pairwise(files)}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": table}))  # JSON is YAML
    for words in (["init", "--no-scm", "--quiet"], ["config", "core.analytics", "false"], ["repro", "--quiet"]):
        call([*dvc, *words], folder)


def many_stages(folder: Path) -> Path:
    """Makes a recipe of MODELS over one corpus, and a cache in which all stages are finished, with tiny artifacts."""
    folder.mkdir()
    (folder / "text.txt").write_text("The heart pumps blood.\n")
    tables: dict[str, Any] = {"corpus": {"kind": "corpus", "sources": [{"files": "text.txt"}]}}
    sizes = {"hidden_size": 32, "layers": 1, "heads": 1}
    for n in range(MODELS):
        tables |= {
            f"tokenizer-{n}": {"kind": "tokenizer", "corpus": "corpus", "vocab_size": 301 + n},
            f"tokens-{n}": {"kind": "pack", "corpus": "corpus", "tokenizer": f"tokenizer-{n}", "context": 32},
            f"base-{n}": {"kind": "pretrain", "tokens": f"tokens-{n}", "architecture": sizes},
        }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps({"name": "many", "stage": tables}))
    stages, store = load_recipe(path).stages, Store(folder / "cache")
    inputs, digests = inputs_of(stages), dict[str, str]()
    for name, stage in stages.items():
        artifacts = {source: digests[source] for source in inputs[name]}
        what = identity(stage, artifacts=artifacts, files=store.digests.of_inputs)
        work = store.work(stage, key_of(what))
        work.mkdir(parents=True)
        (work / "content").write_text(name)
        metrics = {"tokens": 1, "steps": 1, "train": {"tokens": 1}}
        finished = {"finished": "2026-01-01T00:00:00+00:00", "seconds": 1.0}
        facts = {"identity": what, "metrics": metrics, "inputs": {}, **finished}
        digests[name] = store.finish(stage, key_of(what), facts).digest
    return path


def measure_live_view(recipe: Path, stage: str, rounds: int) -> bool:
    """Prints the shares of processor time; whether their median is within the limit."""
    shares, cores = [], available_cores()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="live-view-") as folder:
            seconds, processor = watched([*RUN, str(recipe), "--cache", folder, "--until", stage])
        shares.append(processor / (seconds * cores))
        print(f"{processor:.2f} s of processor time in {seconds:.1f} s on {cores} cores: {shares[-1]:.2%}", flush=True)
    print(f"{statistics.median(shares):.2%} of the run")
    return statistics.median(shares) <= VIEW_SHARE


def watched(command: list[str]) -> tuple[float, float]:
    """Seconds from the first report of the training to its last, and processor seconds of the parent in that time."""
    child, screen = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    termios.tcsetwinsize(screen, (40, 120))
    process, output = psutil.Process(child), b""
    reports: list[tuple[float, float]] = []  # when, and processor seconds until then
    with contextlib.suppress(OSError):  # raised by Linux when the other end is closed
        while data := os.read(screen, 1 << 16):
            output = output[-1000:] + data
            if b"tokens/s" in output:
                times = process.cpu_times()
                reports.append((time.monotonic(), times.user + times.system))
    _, status = os.waitpid(child, 0)
    if not reports or os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"the run failed or reported no step: {output.decode(errors='replace')}")
    return reports[-1][0] - reports[0][0], reports[-1][1] - reports[0][1]


if __name__ == "__main__":
    sys.exit(main())

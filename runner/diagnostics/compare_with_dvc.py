"""Measures the time of doing nothing: a fully cached quickstart, `dvc repro` of as many trivial stages, and a plan of 1,000 stages.

    python -m runner.diagnostics.compare_with_dvc [--rounds 10] [--json]

Each is called as a user calls it, in a process of its own. They take turns, so that other load on the machine affects all of
them; the ratio is the median over rounds. DVC is the one on PATH, else it is installed into a temporary environment. The
quickstart runs first if it is not in the cache yet. Not a test, because the result depends on the machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runner.cache.store import Store
from runner.graph import identity, in_order, inputs_of, key_of
from runner.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
MANY = 1000  # stages of the plan
SHARE = 0.5  # limit for a fully cached quickstart, of DVC's time
SECONDS = 1.0  # limit for the plan
WARM_UP = 2  # rounds that are not counted


def main() -> int:
    """Measures and prints; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description="A fully cached quickstart and a plan of 1,000 stages, compared with DVC.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cache", type=Path, help="of the quickstart (default: that of the project)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stockpot-dvc-") as folder:
        place = Path(folder)
        run = [sys.executable, "-m", "runner.cli"]
        cached = [*run, "run", str(QUICKSTART), "--cache", str(options.cache or ROOT / "cache")]
        call(cached, ROOT)  # makes what is not in the cache yet
        stages = load_recipe(QUICKSTART).stages
        dvc = dvc_command(place / "venv")
        pipeline(place / "few", dvc, len(stages))
        many = many_stages(place / "many")
        plan = [*run, "plan", str(many), "--cache", str(many.parent / "cache"), "--json"]
        states = json.loads(call(plan, ROOT).stdout)["stages"]
        assert len(states) == MANY and {stage["state"] for stage in states} == {"cached"}
        found = measure(
            {
                "quickstart": lambda: call(cached, ROOT),
                "dvc": lambda: call([*dvc, "repro", "--quiet"], place / "few"),
                "plan": lambda: call(plan, ROOT),
            },
            rounds=options.rounds,
        )
        version = call([*dvc, "--version"], place).stdout.strip()
    share = statistics.median(ours / theirs for ours, theirs in zip(found["quickstart"], found["dvc"], strict=True))
    result: dict[str, Any] = {
        "stages": len(stages),
        "dvc_version": version,
        "seconds": {name: statistics.median(seconds) for name, seconds in found.items()},
        "quickstart_of_dvc": share,
        "rounds": found,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        seconds = result["seconds"]
        print(f"fully cached quickstart, {len(stages)} stages: {seconds['quickstart']:.2f} s")
        print(
            f"dvc {version} repro of as many trivial stages: {seconds['dvc']:.2f} s; ours is {share:.2f} of it (limit {SHARE})"
        )
        print(f"plan of {MANY:,} finished stages: {seconds['plan']:.2f} s (limit {SECONDS})")
    return 0 if share < SHARE and statistics.median(found["plan"]) < SECONDS else 1


def measure(candidates: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; the order is reversed from round to round."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-WARM_UP, rounds):
        for name in list(candidates)[:: 1 if number % 2 else -1]:
            begun = time.perf_counter()
            candidates[name]()
            if number >= 0:
                found[name].append(time.perf_counter() - begun)
    return found


def call(command: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command that must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as pip keeps DVC's bytecode, ours may be kept
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def dvc_command(folder: Path) -> list[str]:
    """The command `dvc`, installed into `folder` if it is not on PATH."""
    if path := shutil.which("dvc"):
        return [path]
    venv.create(folder, with_pip=True)
    call([str(folder / "bin" / "pip"), "install", "--quiet", "dvc"], ROOT)
    return [str(folder / "bin" / "dvc")]


def pipeline(folder: Path, dvc: list[str], stages: int) -> None:
    """Makes and runs a pipeline of trivial stages, each of which reads the output of the one before."""
    folder.mkdir()
    (folder / "file-0").write_text("begin\n")
    table = {
        f"stage-{number}": {
            "cmd": f"cp file-{number - 1} file-{number}",
            "deps": [f"file-{number - 1}"],
            "outs": [f"file-{number}"],
        }
        for number in range(1, stages + 1)
    }
    (folder / "dvc.yaml").write_text(json.dumps({"stages": table}))  # JSON is YAML
    call([*dvc, "init", "--no-scm", "--quiet"], folder)
    call([*dvc, "config", "core.analytics", "false"], folder)
    call([*dvc, "repro", "--quiet"], folder)


def many_stages(folder: Path) -> Path:
    """Makes a recipe of MANY stages over one corpus, and a cache in which all of them are finished, with tiny artifacts."""
    folder.mkdir()
    (folder / "text.txt").write_text("The heart pumps blood.\n")
    tables = ['name = "many"', '[stage.corpus]\nkind = "corpus"\nsources = [{ files = "text.txt" }]']
    sizes = "{ hidden_size = 32, layers = 1, heads = 1 }"
    made = 1
    while made < MANY:
        names = [f"tokenizer-{made}", f"tokens-{made}", f"base-{made}"][: MANY - made]
        texts = [
            f'[stage.tokenizer-{made}]\nkind = "tokenizer"\ncorpus = "corpus"\nvocab_size = {300 + made}',
            f'[stage.tokens-{made}]\nkind = "pack"\ncorpus = "corpus"\ntokenizer = "tokenizer-{made}"\ncontext = 32',
            f'[stage.base-{made}]\nkind = "pretrain"\ntokens = "tokens-{made}"\narchitecture = {sizes}',
        ]
        tables += texts[: len(names)]
        made += len(names)
    path = folder / "recipe.toml"
    path.write_text("\n".join(tables) + "\n")
    recipe, store = load_recipe(path), Store(folder / "cache")
    inputs, digests = inputs_of(recipe.stages), dict[str, str]()
    for name in in_order(inputs_of(recipe.stages)):
        stage = recipe.stages[name]
        artifacts = {source: digests[source] for source in inputs[name]}
        what = identity(stage, artifacts=artifacts, files=store.digests.of_inputs)
        work = store.work(stage, key_of(what))
        work.mkdir(parents=True)
        (work / "content").write_text(name)
        facts = {"identity": what, "metrics": {}, "finished": "2026-01-01T00:00:00+00:00", "inputs": {}}
        digests[name] = store.finish(stage, key_of(what), facts).digest
    return path


if __name__ == "__main__":
    sys.exit(main())

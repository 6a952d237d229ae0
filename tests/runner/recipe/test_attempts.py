"""Attempts: which branches a recipe becomes, when each of them runs, and what is taken from them."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from small_cache import FILES

from runner.artifacts import SCRATCH
from runner.cache.store import Store
from runner.errors import RecipeError
from runner.planning import outcomes
from runner.planning.plan import Plan
from runner.planning.plan_json import as_json
from runner.recipe.recipe import Recipe, load_recipe
from runner.stages import stage_kinds

RECIPE = """
name = "attempts"
seed = 5
[stage.base]
kind = "checkpoint"
folder = "model"
[stage.medical]
kind = "lora"
base = "base"
data = [{ files = "rows.jsonl" }]
attempts = [{ r = 8 }, { r = 4, learning_rate = 1e-4 }, { r = 2 }]
[stage.release]
kind = "merge"
base = "base"
adapters = ["medical"]
[stage.before]
kind = "evaluate"
model = "base"
tasks = [{ name = "general", task = "text", files = "rows.jsonl" }]
[stage.after]
kind = "evaluate"
model = "release"
tasks = [{ name = "general", task = "text", files = "rows.jsonl" }]
gates = [{ score = "general.bits_per_byte", at_most = 2.0 }]
[stage.publish]
kind = "publish"
model = "release"
scores = ["before", "after"]
"""
PLAIN = RECIPE.replace("attempts = [{ r = 8 }, { r = 4, learning_rate = 1e-4 }, { r = 2 }]", "attempts = []")
GATE = "stage.after.gates=[{{ score = 'general.bits_per_byte', at_most = {} }}]"


def write(folder: Path, text: str = RECIPE) -> Path:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "text": "c"}\n', encoding="utf-8")
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return folder / "recipe.toml"


def finish(store: Store, plan: Plan, name: str, scores: dict[str, float]) -> None:
    """What running a stage leaves; of an evaluation its bits per byte."""
    entry = plan.entries[name]
    work = store.work(entry.stage, str(entry.key))
    (work / SCRATCH).mkdir(parents=True)
    for file in FILES.get(entry.stage.makes, ["parity.json"]):
        (work / file).write_text(str(entry.key))
    metrics: dict[str, Any] = {"loss": 1.0, "checks": [], "tokens": 1, "steps": 1, "train": {"tokens": 1}}
    if entry.stage.kind == "evaluate":
        found = {"general.bits_per_byte": scores[name], "general.perplexity": 9.0}
        metrics = {"scores": found, "tasks": {"general": {"rows": 1, "examples": "same"}}}
    inputs = {source: plan.record(source).summary() for source in plan.inputs(name)}
    facts = {
        "identity": entry.identity,
        "metrics": metrics,
        "finished": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "inputs": inputs,
    }
    store.finish(entry.stage, str(entry.key), facts)


def run(recipe: Recipe, store: Store, scores: dict[str, float], *, until: str | None = None) -> list[str]:
    """Runs what the plan asks for, one stage after the other; returns their names."""
    names = []
    while entry := (plan := Plan(recipe, store, until=until)).next():
        finish(store, plan, entry.name, scores)
        names.append(entry.name)
    return names


SECOND_PASSES = {"before": 2.4, "after@1": 2.2, "after@2": 1.9, "after@3": 1.8}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def test_each_attempt_runs_only_after_the_one_before_failed(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    first = Plan(recipe, store)
    assert not any(first.is_needless(entry.name) for entry in first), "none has passed yet"
    assert {entry.state for entry in first} == {"run", "waiting"}
    assert first.entries["medical@2"].reason == "until attempt 1 of medical has failed"
    names = run(recipe, store, SECOND_PASSES)
    assert [name for name in names if "@" in name] == [
        *("medical@1", "release@1", "after@1"),
        *("medical@2", "release@2", "after@2"),
    ]
    assert names[-1] == "publish"
    plan = Plan(recipe, store)
    assert {plan.entries[name].state for name in ("medical@3", "release@3", "after@3")} == {"skipped"}
    assert plan.entries["medical@3"].reason == "attempt 2 of medical passed"
    assert [entry.name for entry in plan if plan.is_needless(entry.name)] == ["medical@3", "release@3", "after@3"]
    assert plan.entries["after@1"].reason == "general.bits_per_byte = 2.2, wanted at most 2: failed"
    assert not outcomes.failed(plan)


def test_stages_behind_the_branches_read_the_attempt_that_passed(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    run(recipe, store, SECOND_PASSES)
    plan = Plan(recipe, store)
    assert plan.inputs("publish") == ["release@2", "before", "after@2", "publish-parity"]
    assert plan.named("medical").name == "medical@2" and plan.named("release").path == plan.entries["release@2"].path
    assert plan.named("medical@1").path != plan.named("medical").path
    seen = plan.sources_read("publish")
    assert {"base", "medical", "release", "before", "after", "publish-parity"} == set(seen)
    assert seen["medical"].key == plan.entries["medical@2"].key


def test_an_attempt_has_the_key_of_the_same_stage_written_by_hand(tmp_path: Path, store: Store) -> None:
    run(load_recipe(write(tmp_path)), store, SECOND_PASSES)
    by_hand = load_recipe(write(tmp_path, PLAIN), ["stage.medical.r=4", "stage.medical.schedule.learning_rate=1e-4"])
    assert {entry.state for entry in Plan(by_hand, store)} == {"cached"}


def test_if_no_attempt_passes_nothing_behind_runs_and_a_table_says_why(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path), [GATE.format(1.0)])
    names = run(recipe, store, SECOND_PASSES)
    assert "publish" not in names and names[-1] == "before"
    plan = Plan(recipe, store)
    assert plan.entries["publish"].state == "skipped"
    assert {plan.entries[name].state for name in ("medical@1", "medical@2", "medical@3")} == {"cached"}
    lines = outcomes.failed(plan)
    assert [" ".join(line.split()) for line in lines] == [
        "medical general.bits_per_byte at most 1",
        "medical@1 r = 8 2.2 failed failed",
        "medical@2 r = 4, schedule.learning_rate = 0.0001 1.9 failed failed",
        "medical@3 r = 2 1.8 failed failed",
        "no attempt of medical passed its gates, so none is used",
    ]


def test_other_gates_select_another_attempt_and_rerun_none(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path)
    run(load_recipe(path, [GATE.format(1.0)]), store, SECOND_PASSES)
    for bound, standing in ((1.85, "medical@3"), (2.0, "medical@2"), (2.3, "medical@1")):
        recipe = load_recipe(path, [GATE.format(bound)])
        assert run(recipe, store, SECOND_PASSES) == ["publish-parity", "publish"]
        assert Plan(recipe, store).named("medical").name == standing


def test_the_artifacts_of_a_failed_attempt_may_be_deleted(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    run(recipe, store, SECOND_PASSES)
    for name in ("medical@1", "release@1", "after@1"):
        entry = Plan(recipe, store).entries[name]
        store.set_aside(entry.stage.kind, str(entry.key))
    plan = Plan(recipe, store)
    assert plan.next() is None
    assert plan.entries["after@1"].reason.endswith("failed; artifact gone, not needed now")


def test_until_a_stage_with_attempts_runs_their_evaluations(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe.needed("medical@1") == {"base", "medical@1"}
    assert recipe.needed("medical@2") == {"base", "medical@1", "release@1", "after@1", "medical@2"}
    assert recipe.needed("medical") == {"base", *(f"{m}@{n}" for m in ("medical", "release", "after") for n in (1, 2, 3))}
    assert recipe.needed("publish") == set(recipe.stages)
    assert run(recipe, store, SECOND_PASSES, until="release@1") == ["base", "medical@1", "release@1"]
    assert run(recipe, store, SECOND_PASSES, until="medical") == ["after@1", "medical@2", "release@2", "after@2"]


def test_a_plan_as_json_says_which_attempt_is_selected(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    run(recipe, store, SECOND_PASSES)
    stages = {stage["name"]: stage for stage in as_json(Plan(recipe, store))["stages"]}
    assert stages["after@1"]["gates"] == [{"gate": "general.bits_per_byte at most 2", "found": "2.2", "passed": False}]
    assert stages["after@1"]["attempt"] == {"of": "medical", "number": 1, "changes": "r = 8", "stands": False}
    assert stages["medical@2"]["attempt"]["stands"]
    assert "attempt" not in stages["base"]


def test_a_resolved_recipe_means_the_same_again(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    again = tmp_path / "again.toml"
    again.write_text(tomli_w.dumps(recipe.resolved()), encoding="utf-8")
    assert load_recipe(again).stages == recipe.stages


def test_a_recipe_resolved_with_the_attempt_that_passed_is_one_without_attempts(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    again = tmp_path / "again.toml"
    again.write_text(tomli_w.dumps(recipe.resolved({"medical": 1})), encoding="utf-8")
    found = load_recipe(again)
    assert not found.families
    assert found.stages["medical"] == recipe.stages["medical@2"]


def test_files_named_by_an_attempt_are_found_from_a_recipe_in_another_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write(inner, RECIPE.replace("{ r = 2 }", "{ data = [{ files = 'rows.jsonl' }] }"))
    outer = tmp_path / "outer.toml"
    outer.write_text('extends = "inner/recipe.toml"\n', encoding="utf-8")
    resolved = load_recipe(outer).resolved()["stage"]["medical"]["attempts"]
    assert resolved[2]["data"][0]["files"] == "inner/rows.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace("{ r = 2 }", "{ r = -2 }"), r"stage.medical.attempts\[2\].r: expected greater than 0, got -2"),
        (RECIPE.replace("{ r = 2 }", "{ rr = 2 }"), r"stage.medical.attempts\[2\].rr: is not known here"),
        (
            RECIPE.replace("{ r = 2 }", "{ kind = 'sft' }"),
            r"stage.medical.attempts\[2\].kind: expected it outside of the attempts",
        ),
        (RECIPE.replace("{ r = 2 }", "3"), r"stage.medical.attempts\[2\]: expected a table, got 3"),
        (RECIPE.replace("gates = ", "# "), "stage.medical.attempts: expected an evaluation with gates behind it"),
        (
            RECIPE.replace("stage.before]", 'stage."medical@1"]').replace('"before", ', ""),
            "stage.medical@1: expected another name",
        ),
        (
            RECIPE.replace('"medical"]', '"medical", "legal"]')
            + '[stage.legal]\nkind = "lora"\nbase = "base"\ndata = [{ files = "rows.jsonl" }]\nattempts = [{ r = 1 }]\n',
            "stage.legal.attempts: expected no stage that attempts of 'medical' run too, got after, release",
        ),
        (RECIPE.replace("{ r = 2 }", "{ base = 'release' }"), "expected stages without a cycle, got .*@3"),
    ],
)
def test_attempts_that_cannot_be_run_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


BUDGET = "gates = [{ score = 'general.bits_per_byte', at_most = 0.05, above = 'before' }]"


def test_a_gate_on_forgetting_adds_an_edge_that_is_in_no_key_but_that_of_the_release(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path, PLAIN)
    scores = {"before": 1.0, "after": 1.04}
    run(load_recipe(path), store, scores)
    keys = {entry.name: entry.key for entry in Plan(load_recipe(path), store)}
    published = keys.pop("publish")  # with its recipe, of which the gate is a part
    recipe = load_recipe(write(tmp_path, PLAIN.replace("gates = [", f"{BUDGET} # [")))
    plan = Plan(recipe, store)
    changed = {entry.name: entry.key for entry in plan}
    assert changed.pop("publish") != published and changed == keys
    assert plan.inputs("after") == ["release"]
    assert str(plan.entries["after"].verdicts[0]) == (
        "general.bits_per_byte = 1.04, 0.04 above before, wanted at most 0.05 above before: passed"
    )
    assert recipe.needed("after") == {"base", "medical", "release", "before", "after"}


def test_readers_of_an_evaluation_wait_for_the_one_that_its_gate_compares_with(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE.replace("gates = [", f"{BUDGET} # [")))
    scores = {"before": 1.0, "after@1": 1.06, "after@2": 1.04}
    for name in ("base", "medical@1", "release@1", "after@1"):
        finish(store, Plan(recipe, store), name, scores)
    plan = Plan(recipe, store)
    assert plan.entries["after@1"].verdicts[0].passed is None
    assert plan.entries["medical@2"].state == plan.entries["publish"].state == "waiting"
    assert run(recipe, store, scores) == ["before", "medical@2", "release@2", "after@2", "publish-parity", "publish"]


def test_a_gate_on_other_rows_or_on_a_training_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    other_rows = RECIPE.replace("gates = [", f"{BUDGET} # [").replace(
        'rows.jsonl" }]\n[stage.after]', 'rows.jsonl", limit = 1 }]\n[stage.after]'
    )
    with pytest.raises(
        RecipeError, match=r"stage.after.gates\[0\].above: expected an evaluation with the same task 'general'"
    ):
        load_recipe(write(tmp_path, other_rows))
    gap = RECIPE.replace("gates = [", "gates = [{ score = 'train_gap', at_most = 0.05 }] # [")
    with pytest.raises(
        RecipeError,
        match=r"stage.after.gates\[0\].score: expected held-out rows in stage 'medical', got none; set `validation`",
    ):
        load_recipe(write(tmp_path, gap))
    load_recipe(write(tmp_path, gap.replace("attempts =", 'validation = [{ files = "rows.jsonl" }]\nattempts =')))


# The whole way, with real workers: two attempts of full fine-tuning on a tiny model


TUNING = """
name = "tuning"
[parallel]
compile = false
[stage.base]
kind = "checkpoint"
folder = "model"
[stage.tuned]
kind = "sft"
model = "base"
data = [{ files = "rows.jsonl", prompt = "{label}?", response = "{text}" }]
validation = [{ files = "rows.jsonl", prompt = "{label}?", response = "{text}" }]
batch_tokens = 128
checkpoint_every = 2
budget = { steps = 1 }
attempts = [{ learning_rate = 1e-6 }, { learning_rate = 1e-2, steps = 60 }]
[stage.after]
kind = "evaluate"
model = "tuned"
gates = [
  { score = "general.bits_per_byte", at_most = 2.0, confidence = 0.9 },
  { score = "ab.likelihood_win_rate", at_least = 0.5 },
  { score = "train_gap", at_most = 5.0 },
]
[[stage.after.tasks]]
name = "general"
task = "answers"
files = "rows.jsonl"
prompt = "{label}?"
response = "{text}"
max_new_tokens = 0
[[stage.after.tasks]]
name = "ab"
task = "compare"
against = "base"
files = "rows.jsonl"
prompt = "{label}?"
response = "{text}"
max_new_tokens = 8
[stage.publish]
kind = "publish"
model = "tuned"
scores = ["after"]
"""


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *words), capture_output=True, text=True)


def command(folder: Path, verb: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "runner.cli", verb, str(folder / "recipe.toml"), *words, "--cache", str(folder / "cache")]


def begun(said: str) -> list[str]:
    """The stages that a run began, as it said."""
    kinds = "|".join(stage_kinds())
    return [line.split()[0] for line in said.splitlines() if re.match(rf"\S+ +({kinds}): ", line)]


def states(folder: Path, *words: str) -> dict[str, str]:
    plan = json.loads(call(folder, "plan", "--json", *words).stdout)
    return {stage["name"]: stage["state"] for stage in plan["stages"]}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose run was killed in the middle of its second attempt, and has then gone on to the end."""
    from random_model import random_model  # imports torch

    folder = tmp_path_factory.mktemp("tuning")
    rows = [
        {"text": f"the {a} is {b}", "label": f"{a} <b>"} for a in ("heart", "lung", "skin") for b in ("red", "dry", "soft")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    random_model(folder / "model", [row["text"] for row in rows], 280, seed=1)
    (folder / "recipe.toml").write_text(TUNING, encoding="utf-8")
    process = subprocess.Popen(command(folder, "run"), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while not list(folder.glob("cache/work/sft-*/.work/checkpoints/step-0*[4-9]*/*.json")):  # only the second has as many
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert states(folder)["tuned@2"] == "resume"
    done = call(folder, "run")
    assert done.returncode == 0, done.stderr
    assert "continues from step" in done.stderr
    assert begun(done.stderr) == ["tuned@2", "after@2", "publish-parity", "publish"]
    (folder / "said").write_text(done.stderr, encoding="utf-8")
    return folder


def test_a_second_attempt_that_was_killed_and_restarted_passes_and_is_released(tuned: Path) -> None:
    found = states(tuned)
    assert set(found.values()) == {"cached"}
    said = (tuned / "said").read_text(encoding="utf-8")
    assert "tuned@2  schedule.learning_rate = 0.01, budget.steps = 60" in said
    released = Path(call(tuned, "path", "publish").stdout.strip())
    weights = Path(call(tuned, "path", "tuned").stdout.strip()) / "model.safetensors"
    assert weights.read_bytes() == (released / "model.safetensors").read_bytes()
    assert set(json.loads((released / "scores.json").read_text())) == {"after"}
    recipe = (released / "recipe.toml").read_text(encoding="utf-8")
    assert "learning_rate = 0.01" in recipe and "@" not in recipe
    card = (released / "README.md").read_text(encoding="utf-8")
    assert "at most 2 with 90% confidence" in card and "ab.likelihood_win_rate" in card


def test_when_no_attempt_passes_the_run_exits_with_4_and_releases_nothing(tuned: Path) -> None:
    gates = "stage.after.gates=[{ score = 'general.bits_per_byte', at_most = 0.0 }]"
    done = call(tuned, "run", "--set", gates)
    assert done.returncode == 4, done.stderr
    assert begun(done.stderr) == []
    *_, header, first, second, conclusion, skipped = done.stderr.splitlines()
    assert header.split() == ["tuned", "general.bits_per_byte", "at", "most", "0"]
    assert [line.split()[0] for line in (first, second)] == ["tuned@1", "tuned@2"]
    assert all(line.split()[-2:] == ["failed", "failed"] for line in (first, second))
    assert conclusion == "no attempt of tuned passed its gates, so none is used"
    assert skipped == "skipped because of it: publish-parity, publish"
    assert states(tuned, "--set", gates)["publish"] == "skipped"
    path = call(tuned, "path", "tuned", "--set", gates)
    assert path.returncode == 1 and "no attempt has passed its gates" in path.stderr
    assert states(tuned)["publish"] == "cached", "with its own gates the recipe is as before"


def test_the_answers_of_both_models_are_shown_side_by_side(tuned: Path) -> None:
    folder = Path(call(tuned, "path", "after").stdout.strip())
    page = (folder / "ab.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 9 and "the heart is red" in page
    assert "heart &lt;b&gt;?" in page and "<b>" not in page and "<script" not in page and "http" not in page
    values = json.loads((folder / "values.json").read_text())
    assert len(values["ab"]["win_rate"]) == len(values["general"]["nats"]) == 9
    found = json.loads((folder / "scores.json").read_text())
    low, high = found["intervals"]["ab.likelihood_win_rate"]
    assert low <= found["scores"]["ab.likelihood_win_rate"] <= high

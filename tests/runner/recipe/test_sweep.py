"""Sweeps: which branches a recipe becomes, that all of them run and share what is equal, and that the best is taken."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from small_cache import FILES
from small_recipe import RECIPE as SMALL
from small_recipe import Folder

from runner.artifacts import SCRATCH
from runner.cache.store import Store
from runner.errors import RecipeError
from runner.execution.stage_run import job_of
from runner.hub.model_card import Model, model_card
from runner.planning import outcomes
from runner.planning.plan import Plan
from runner.planning.plan_json import as_json
from runner.recipe.recipe import Recipe, load_recipe
from runner.recipe.schema import recipe_schema
from runner.reporting import report
from runner.serving.models import servable_models

RECIPE = """
name = "compared"
[sweep]
highest = "after.general.accuracy"
"stage.medical.r" = [4, 8, 16]
[stage.base]
kind = "checkpoint"
folder = "model"
[stage.medical]
kind = "lora"
base = "base"
data = [{ files = "rows.jsonl" }]
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
tasks = [
  { name = "general", task = "classification", files = "rows.jsonl" },
  { name = "text", task = "text", files = "rows.jsonl" },
]
[stage.publish]
kind = "publish"
model = "release"
adapter = "medical"
scores = ["before", "after"]
"""
FIELD = '"stage.medical.r" = [4, 8, 16]'
GATE = "gates = [{ score = 'text.bits_per_byte', at_most = 2.0 }]\n[stage.publish]"


def write(folder: Path, text: str = RECIPE) -> Path:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "text": "c"}\n', encoding="utf-8")
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return folder / "recipe.toml"


def run(recipe: Recipe, store: Store, scores: dict[str, float], *, until: str | None = None) -> list[str]:
    """Leaves what running each stage would, of an evaluation these accuracies and half as many bits; returns their names."""
    names = []
    while entry := (plan := Plan(recipe, store, until=until)).next():
        work = store.work(entry.stage, str(entry.key))
        (work / SCRATCH).mkdir(parents=True)
        for file in FILES.get(entry.stage.makes, ["parity.json"]):
            (work / file).write_text("" if file == "errors.jsonl" else str(entry.key))
        metrics: dict[str, Any] = {"loss": 1.0, "checks": [], "tokens": 1, "steps": 1, "train": {"tokens": 1}}
        if entry.stage.kind == "evaluate":
            score = scores.get(entry.name, 0.0)
            metrics = {"scores": {"general.accuracy": score, "text.bits_per_byte": score / 2}, "tasks": {}}
        inputs = {source: plan.record(source).summary() for source in plan.inputs(entry.name)}
        facts = {
            "identity": entry.identity,
            "metrics": metrics,
            "finished": "2026-01-01T00:00:00+00:00",
            "seconds": 1.0,
            "inputs": inputs,
        }
        store.finish(entry.stage, str(entry.key), facts)
        names.append(entry.name)
    return names


SECOND = {"after@1": 0.5, "after@2": 0.9, "after@3": 0.7}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def test_all_settings_run_and_stages_behind_read_the_best(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    first = Plan(recipe, store)
    assert first.entries["medical@3"].state == "waiting" and first.entries["medical@3"].reason == "for base"
    assert first.entries["publish"].reason == "for the highest after.general.accuracy of 3 settings"
    names = run(recipe, store, SECOND)
    assert names[0] == "base" and names[-1] == "publish"
    assert [name for name in names if "@" in name] == [
        f"{name}@{n}" for n in (1, 2, 3) for name in ("medical", "release", "after")
    ]
    plan = Plan(recipe, store)
    assert plan.inputs("publish") == ["release@2", "before", "after@2", "medical@2", "publish-parity"]
    assert plan.named("medical").name == "medical@2" and plan.named("medical@3").name == "medical@3"
    assert plan.is_in_use("medical@2") and not plan.is_in_use("medical@1")
    assert {entry.state for entry in plan} == {"cached"}


def test_a_setting_has_the_key_of_the_same_stage_written_by_hand(tmp_path: Path, store: Store) -> None:
    run(load_recipe(write(tmp_path)), store, SECOND)
    sweep = '[sweep]\nhighest = "after.general.accuracy"\n'
    by_hand = load_recipe(write(tmp_path, RECIPE.replace(f"{sweep}{FIELD}\n", "")))
    assert not by_hand.families
    plan = Plan(load_recipe(write(tmp_path, by_hand.path.read_text()), ["stage.medical.r=8"]), store)
    assert {entry.state for entry in plan} == {"cached"}


def test_lowest_selects_the_lowest_score_and_of_equals_the_first(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE.replace("highest", "lowest")))
    run(recipe, store, {"after@1": 0.9, "after@2": 0.5, "after@3": 0.5})
    assert Plan(recipe, store).named("release").name == "release@2"
    other = load_recipe(write(tmp_path, RECIPE))
    assert run(other, store, {}) == ["publish-parity", "publish"], "only what follows is made of another setting"
    assert Plan(other, store).named("release").name == "release@1"


def test_a_setting_whose_gates_fail_is_not_the_best(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE.replace("[stage.publish]", GATE)))
    run(recipe, store, {"after@1": 0.5, "after@2": 4.4, "after@3": 0.7})
    plan = Plan(recipe, store)
    assert plan.named("after").name == "after@3" and not outcomes.failed(plan)
    assert "failed its gates" in next(line for line in outcomes.passed(plan) if line.startswith("after@2"))


def test_if_no_setting_passes_its_gates_nothing_behind_runs(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE.replace("[stage.publish]", GATE)))
    names = run(recipe, store, {"after@1": 5.0, "after@2": 6.0, "after@3": 7.0})
    assert "publish" not in names and {"after@1", "after@2", "after@3"} < set(names)
    plan = Plan(recipe, store)
    assert plan.entries["publish"].state == "skipped"
    assert plan.entries["publish"].reason == "no setting of the sweep passed its gates"
    told = outcomes.failed(plan)
    assert told[0] == "after@1: text.bits_per_byte = 2.5, wanted at most 2: failed"
    assert told[-1] == "no setting of the sweep passed its gates, so none is used"


GRID = '"stage.base.chat_template" = ["{{ messages }}", "{{ messages[0] }}"]\n"stage.medical.r" = [4, 8]'


def test_common_stages_of_settings_exist_once(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE.replace(FIELD, GRID)))
    names = run(recipe, store, {"after@1": 0.1, "after@2": 0.2, "after@3": 0.4, "after@4": 0.3})
    assert [name for name in names if name.startswith("base")] == ["base@1", "base@3"]
    assert [name for name in names if name.startswith("medical")] == [f"medical@{n}" for n in (1, 2, 3, 4)]
    plan = Plan(recipe, store)
    assert plan.inputs("medical@2") == ["base@1"] and plan.inputs("medical@4") == ["base@3"]
    assert plan.named("base").name == "base@3" and plan.named("medical").name == "medical@3"
    assert plan.is_in_use("base@3") and not plan.is_in_use("base@1")
    assert [row[1:3] for row in outcomes.sweep_rows(plan, recipe.sweep)][2] == ["'{{ messages }}'", "8"]  # type: ignore[arg-type]


def test_the_table_and_the_plan_as_json_have_every_score(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    assert [line.split()[-1] for line in outcomes.sweep_table(Plan(recipe, store))[2:]] == ["waiting"] * 3
    run(recipe, store, SECOND)
    plan = Plan(recipe, store)
    assert [line.split() for line in outcomes.sweep_table(plan)] == [
        ["sweep,", "highest", "after.general.accuracy:"],
        ["setting", "medical.r", "general.accuracy", "text.bits_per_byte"],
        ["after@1", "4", "0.5", "0.25"],
        ["after@2", "8", "0.9", "0.45", "best"],
        ["after@3", "16", "0.7", "0.35"],
    ]
    found = as_json(plan)
    assert found["sweep"]["best"] == 2 and found["sweep"]["wanted"] == "highest after.general.accuracy"
    assert found["sweep"]["settings"][2] == {"number": 3, "values": {"medical.r": 16}, "score": 0.7, "passed": True}
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert stages["medical@2"]["setting"] == {"numbers": [2], "stands": True} and "setting" not in stages["base"]
    page = report.as_markdown(report.RunReport(recipe, plan, now=datetime.datetime(2026, 1, 1)))
    assert "| after@2 | 8 | 0.9 | 0.45 | best |" in page
    assert "after@3" in report.as_html(report.RunReport(recipe, plan, now=datetime.datetime(2026, 1, 1)))


def test_a_release_knows_its_setting_and_the_others(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    run(recipe, store, SECOND)
    plan = Plan(recipe, store)
    job = job_of(plan.entries["publish"], plan, recipe, store, work=tmp_path, processes=1, cores=1)
    assert job.inputs["medical"] == str(plan.entries["medical@2"].path) and "r = 8" in job.recipe
    assert "sweep" not in job.recipe and "@" not in job.recipe
    card = model_card(Model({"name": "m", "stage": {}}, {}, {}, "mit", ["en"], "1", settings=job.settings))
    assert "## Settings that were compared" in card and "| after@2 | 8 | 0.9 | 0.45 | best |" in card
    of_setting = job_of(plan.entries["release@1"], plan, recipe, store, work=tmp_path, processes=1, cores=1)
    assert not of_setting.settings


def test_until_a_swept_stage_runs_all_settings_and_with_a_number_one(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe.needed("medical@2") == {"base", "medical@2"}
    assert recipe.needed("medical") == {"base", *(f"{m}@{n}" for m in ("medical", "release", "after") for n in (1, 2, 3))}
    assert run(recipe, store, SECOND, until="release@3") == ["base", "medical@3", "release@3"]
    assert [model.name for model in servable_models(recipe, Plan(recipe, store), ["release@3"])] == ["release@3"]
    assert "medical@3" not in run(recipe, store, SECOND, until="after")


def test_artifacts_of_unselected_settings_may_be_deleted(tmp_path: Path, store: Store) -> None:
    recipe = load_recipe(write(tmp_path))
    run(recipe, store, SECOND)
    for name in ("medical@1", "release@1", "after@1"):
        entry = Plan(recipe, store).entries[name]
        store.set_aside(entry.stage.kind, str(entry.key))
    assert Plan(recipe, store).next() is None


ATTEMPTS = """
[stage.chat]
kind = "sft"
model = "base"
data = [{ files = "rows.jsonl" }]
attempts = [{ seed = 1 }, { seed = 2 }]
[stage.talked]
kind = "evaluate"
model = "chat"
tasks = [{ name = "general", task = "text", files = "rows.jsonl" }, { name = "text", task = "text", files = "rows.jsonl" }]
gates = [{ score = "text.bits_per_byte", at_most = 2.0 }]
"""


def test_a_sweep_behind_attempts_is_over_the_attempt_that_passed(tmp_path: Path, store: Store) -> None:
    text = RECIPE.replace('base = "base"', 'base = "chat"') + ATTEMPTS
    recipe = load_recipe(write(tmp_path, text))
    assert list(recipe.families) == ["chat", "medical"]
    names = run(recipe, store, {**SECOND, "talked@1": 6.0, "talked@2": 1.0})
    assert names.index("talked@2") < names.index("medical@1")
    plan = Plan(recipe, store)
    assert plan.inputs("medical@3") == ["chat@2"] and plan.inputs("publish")[0] == "release@2"
    common = RECIPE.replace("[stage.medical]", "[stage.medical]\nattempts = [{ r = 2 }]").replace("[stage.publish]", GATE)
    with pytest.raises(RecipeError, match="sweep: expected no stage that attempts of 'medical' run too, got after, medical"):
        load_recipe(write(tmp_path, common))


def test_attempts_behind_a_sweep_are_over_its_best_setting(tmp_path: Path, store: Store) -> None:
    tables = ATTEMPTS.replace('model = "base"', 'model = "release"')
    recipe = load_recipe(write(tmp_path, RECIPE + tables))
    assert list(recipe.families) == ["medical", "chat"]
    names = run(recipe, store, {**SECOND, "talked@1": 6.0, "talked@2": 1.0})
    assert names.index("after@3") < names.index("chat@1") < names.index("chat@2")
    plan = Plan(recipe, store)
    assert plan.inputs("chat@1") == plan.inputs("chat@2") == ["release@2"] and plan.named("chat").name == "chat@2"


def test_fields_may_be_written_as_tables_and_set_from_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path)
    tables = load_recipe(path, ["sweep.stage.medical.r=[2, 3]", "sweep.stage.medical.learning_rate=[1e-3]"])
    assert tables.sweep is not None and tables.sweep.describe(1) == "medical.r = 3, medical.schedule.learning_rate = 0.001"
    again = tmp_path / "again.toml"
    again.write_text(tomli_w.dumps(tables.resolved()), encoding="utf-8")
    assert load_recipe(again).stages == tables.stages
    best = tmp_path / "best.toml"
    best.write_text(tomli_w.dumps(tables.resolved({"medical": 1})), encoding="utf-8")
    assert not load_recipe(best).families and load_recipe(best).stages["medical"] == tables.stages["medical@2"]
    outer = tmp_path / "outer.toml"
    outer.write_text('extends = "recipe.toml"\n[sweep]\n"stage.medical.r" = [1]\n', encoding="utf-8")
    assert list(load_recipe(outer).names_of("medical")) == ["medical@1"]


def test_the_schema_knows_a_sweep_and_its_dotted_fields() -> None:
    schema = recipe_schema()
    table = schema["$defs"]["SweepTable"]
    (pattern,) = table["patternProperties"]
    assert re.search(pattern, "stage.medical.r") and not re.search(pattern, "medical.r")
    assert "highest is the best" in table["properties"]["highest"]["description"]
    assert "sweep" in schema["properties"]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ('"stage.medcal.r" = [4]', "sweep.stage.medcal: expected the name of a stage, got 'medcal'; did you mean 'medical'"),
        ('"stage.medical.rr" = [4, 8]', "sweep.stage.medical.rr: is not known here; .*did you mean"),
        (
            '"stage.medical.schedule.warmup_step" = [4]',
            "sweep.stage.medical.schedule.warmup_step: is not known here; .*did you",
        ),
        ('"stage.medical.r" = [4, "8"]', r"sweep.stage.medical.r\[1\]: expected a valid integer, got '8'"),
        ('"stage.medical.r" = [-4, -8]', r"sweep.stage.medical.r\[1\]: expected greater than 0, got -8"),
        ('"stage.medical.r" = []', r"sweep.stage.medical.r: expected at least one value, got \[\]"),
        ('"stage.medical.r" = 4', "sweep.stage.medical.r: expected a list of values, got 4"),
        (
            '"stage.medical.r" = [4, 8, 4]',
            r"sweep.stage.medical.r\[2\]: expected values that give different results, got 4 and 4",
        ),
        (
            '"stage.medical.micro_batch" = [1, 2]',
            "sweep.stage.medical.micro_batch: expected a field that decides the result",
        ),
        ('"stage.medical.kind" = ["sft"]', "sweep.stage.medical.kind: expected it outside of the sweep"),
        ('"stage.after.tasks" = [[]]', "sweep.stage.after.tasks"),
        ('"medical.r" = [4]', "sweep.medical.r: is not known here; expected one of highest, lowest, stage"),
        ("", "sweep: expected at least one field to vary"),
        ("stage.medical = 3", "sweep.stage.medical: expected a table, got 3"),
        ('"stage.medical.r" = [4]\nlowest = "after.text.perplexity"', "exactly one of highest and lowest, got highest and"),
        (
            f'"stage.medical.r" = {list(range(1, 21))}\n"stage.medical.seed" = {list(range(20))}',
            "at most 256 settings, got 400",
        ),
        (
            '"stage.medical.schedule" = [{ learning_rate = 0.1 }]\n"stage.medical.learning_rate" = [0.2]',
            "sweep.stage.medical.schedule.learning_rate: expected a field outside of medical.schedule, which varies too",
        ),
        ('"stage.medical.base" = ["base", "release"]', "expected stages without a cycle"),
        ('"stage.medical.data" = [[{ files = "none.jsonl" }]]', "expected a file, got nothing at"),
    ],
)
def test_fields_that_cannot_vary_are_reported(field: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, RECIPE.replace(FIELD, field)))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            "after.general.acuracy",
            "sweep.highest: expected one of .*, got 'after.general.acuracy'; did you mean 'after.general.accuracy'",
        ),
        ("release", "sweep.highest: expected one of after.general.accuracy, .*, got 'release'"),
        ("before.text.perplexity", "sweep.highest: expected one of .*, got 'before.text"),
        ("before.general.perplexity", "sweep.stage.medical: expected a stage before 'before', whose score decides"),
    ],
)
def test_a_score_that_cannot_decide_is_reported(score: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, RECIPE.replace("after.general.accuracy", score)))


def test_a_stage_with_the_name_of_a_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stage.release@3: expected another name; a setting of the sweep has this one"):
        load_recipe(write(tmp_path, RECIPE.replace("stage.before]", 'stage."release@3"]').replace('"before", ', "")))


# The whole way, with real workers: three ranks on a tiny model that is trained from nothing

REAL = (
    SMALL.replace('name = "small"', 'name = "small"\n[parallel]\ncompile = false').replace(
        "[stage.corpus]",
        """
[sweep]
lowest = "after.text.bits_per_byte"
"stage.medical.r" = [1, 8, 2]
[stage.corpus]""",
        1,
    )
    + """
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 32, layers = 1, heads = 2 }
batch_tokens = 256
budget = { steps = 2 }
[stage.medical]
kind = "lora"
base = "base"
data = [{ files = "rows.jsonl" }]
alpha = 16
batch_tokens = 128
budget = { steps = 20 }
schedule = { learning_rate = 0.02 }
[stage.release]
kind = "merge"
base = "base"
adapters = ["medical"]
[stage.after]
kind = "evaluate"
model = "release"
tasks = [{ name = "text", task = "answers", files = "rows.jsonl", max_new_tokens = 0 }]
[stage.gguf]
kind = "gguf"
model = "release"
"""
)


def test_three_ranks_cost_one_pretraining_and_the_best_is_released(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "real")
    folder.write(REAL)
    rows = [{"prompt": f"heart {number}", "response": "it pumps the blood"} for number in range(8)]
    (folder.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = folder.run()
    assert done.returncode == 0, done.stderr
    kinds = [path.name.split("-")[0] for path in (folder.cache / "stages").iterdir()]
    assert [kinds.count(kind) for kind in ("pretrain", "lora", "merge", "evaluate", "gguf")] == [1, 3, 3, 3, 1]
    scores = [json.loads((folder.artifact(f"after@{n}") / "scores.json").read_text())["scores"] for n in (1, 2, 3)]
    bits = [of_one["text.bits_per_byte"] for of_one in scores]
    best = bits.index(min(bits)) + 1
    assert best != 1 and folder.artifact("release") == folder.artifact(f"release@{best}")
    inputs = json.loads((folder.artifact("gguf") / "record.json").read_text())["inputs"]
    assert inputs["release"]["digest"] == folder.digest(f"release@{best}") != folder.digest("release@1")
    told = [line.split() for line in done.stderr.splitlines() if re.match(r"after@\d +\d", line)]
    assert [line[1] for line in told] == ["1", "8", "2"] and [line[-1] == "best" for line in told].index(True) == best - 1
    assert set(folder.states().values()) == {"cached"}
    more = folder.states("--set", "sweep.stage.medical.r=[1, 8, 2, 4]")
    assert [name for name, state in more.items() if state != "cached"] == ["medical@4", "release@4", "after@4", "gguf"]

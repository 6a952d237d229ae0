"""Views of a run: live on a terminal, JSON for programs, and watching a run that was started elsewhere."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runner.cache.run_log import log_run
from runner.cache.store import Store, Waiting
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe
from runner.reporting.live import LiveView, share_of_peak, sparkline
from runner.reporting.progress import Eta, JsonView, describe
from runner.reporting.watch import running_overrides

RECIPE = """
name = "tiny"
[stage.corpus]
kind = "corpus"
sources = [{ files = "text.jsonl" }]
near_duplicates = false
[stage.tokenizer]
kind = "tokenizer"
corpus = "corpus"
vocab_size = 270
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    lines = [
        json.dumps({"text": f"The heart pumps blood through the whole body, day {day} and night {day}."}) for day in range(30)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path / "tiny.toml"


@pytest.fixture
def plan(recipe: Path, tmp_path: Path) -> Plan:
    return Plan(load_recipe(recipe), Store(tmp_path / "cache"))


def seen(view: LiveView, *, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(view.render())
    return capture.get()


def make_view(expected: dict[str, float]) -> LiveView:
    return LiveView(expected, console=Console(file=io.StringIO(), force_terminal=True, width=120))


def test_a_view_shows_states_curve_speed_and_time_left(plan: Plan) -> None:
    view = make_view({"corpus": 10.0, "tokenizer": 100.0})
    view.planned(plan)
    view.started(plan.entries["corpus"])
    view.reported({"flops_per_token": 1e6, "peak_flops": 1e10})
    for step, loss in ((10, 8.0), (20, 4.0), (30, 1.0)):
        view.reported({"step": step, "steps": 100, "loss": loss, "tokens_per_second": 5000.0})
    text = seen(view)
    assert "step 30/100" in text and "5,000 tokens/s" in text and "50% of peak" in text and "█▄▁" in text
    assert "tokenizer" in text and "about 1:40" in text
    view.finished(plan.entries["corpus"], "done in 7s")
    assert "✓  corpus     done in 7s" in seen(view)
    view.close()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_running_stage_takes_two_lines_however_narrow_the_terminal(plan: Plan, width: int) -> None:
    view = make_view({"corpus": 10.0, "tokenizer": 0.0})
    view.planned(plan)
    view.started(plan.entries["corpus"])
    for step in range(10, 900, 10):
        values = {"loss": 3.613, "learning_rate": 2e-2, "tokens_per_second": 19617.0}
        view.reported({"step": step, "steps": 1954, "flops_per_token": 1.65e7, "peak_flops": 9e11, **values})
    lines = seen(view, width=width).splitlines()
    assert len(lines) == 4, "two of them, the tokenizer and what is left"
    assert "step 890/1954" in lines[0] and "loss 3.613  19,617 tokens/s" in lines[1]
    assert ("learning rate 2.00e-02" in lines[1]) == (width == 120) and "36% of peak" in lines[1]
    assert "only if it is needed" in lines[2]
    view.close()


def test_notes_stay_in_view(plan: Plan) -> None:
    view = make_view({})
    view.planned(plan)
    view.started(plan.entries["corpus"])
    view.reported({"note": "memory ran out"})
    for done in range(100):
        view.reported({"done": done, "total": 100, "unit": "rows"})
    assert "• corpus: memory ran out" in seen(view)
    view.close()


def test_a_stage_that_takes_longer_than_expected_is_never_said_to_have_no_time_left(plan: Plan) -> None:
    view = make_view({entry.name: 0.0 for entry in plan})
    view.planned(plan)
    view.started(list(plan)[-1])
    assert "0s left" not in seen(view) and "about 1s left" in seen(view)
    view.close()


def test_the_time_left_is_unknown_if_that_of_a_stage_is(plan: Plan) -> None:
    view = make_view({"corpus": 10.0})
    view.planned(plan)
    view.started(plan.entries["corpus"])
    assert view.seconds_left() is None
    view.close()


def test_a_view_of_many_stages_stays_on_one_screen(tmp_path: Path, recipe: Path) -> None:
    more = "".join(f'[stage.t{n}]\nkind = "tokenizer"\ncorpus = "corpus"\nvocab_size = {270 + n}\n' for n in range(100))
    recipe.write_text(RECIPE + more, encoding="utf-8")
    plan = Plan(load_recipe(recipe), Store(tmp_path / "cache"))
    view = make_view({})
    view.planned(plan)
    view.started(plan.entries["t50"])
    text = seen(view)
    assert len(text.splitlines()) < 30 and "t50" in text and "before" in text and "more" in text
    view.close()


def test_a_sparkline_is_scaled_from_lowest_to_highest() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁" and sparkline([]) == ""
    assert share_of_peak({"tokens_per_second": 1.0}) is None


def test_every_event_of_the_json_view_is_one_object_on_one_line(plan: Plan) -> None:
    stream = io.StringIO()
    view = JsonView(stream)
    view.planned(plan)
    view.started(plan.entries["corpus"])
    view.reported({"step": 1, "loss": 2.5})
    view.finished(plan.entries["corpus"], "done in 1s")
    view.note("名")
    view.close()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["planned", "started", "reported", "finished", "note", "closed"]
    assert events[2] == {"event": "reported", "stage": "corpus", "step": 1, "loss": 2.5}


@pytest.fixture
def run(recipe: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a command; those still running are killed after the test."""
    started = []

    def start(*words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "runner.cli", *words, "--cache", str(recipe.parent / "cache")]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def events_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_a_run_is_watched_until_it_is_done(recipe: Path, run: Callable[..., "subprocess.Popen[str]"]) -> None:
    watching = run("watch", str(recipe), "--json", "--patience", "60")
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["event"] == "planned"
    working = run(str(recipe), "--json")
    output, _ = working.communicate(timeout=120)
    assert working.returncode == 0
    assert [event["stage"] for event in events_of(output) if event["event"] == "finished"] == ["corpus", "tokenizer"]
    seen_there, faults = watching.communicate(timeout=60)
    assert watching.returncode == 0, faults
    finished = [event["stage"] for event in events_of(seen_there) if event["event"] == "finished"]
    assert finished == ["corpus", "tokenizer"]


def test_watching_ends_after_patience_if_nothing_runs(recipe: Path, run: Callable[..., "subprocess.Popen[str]"]) -> None:
    watching = run("watch", str(recipe), "--patience", "0.1")
    assert watching.communicate(timeout=60) is not None
    assert watching.returncode == 1
    assert not (recipe.parent / "cache" / "logs").exists(), "watching writes nothing"


def test_watching_ends_at_ctrl_c_and_says_that_the_run_goes_on(
    recipe: Path, run: Callable[..., "subprocess.Popen[str]"]
) -> None:
    watching = run("watch", str(recipe), "--json")
    assert watching.stdout is not None
    watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    output, _ = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert events_of(output)[0] == {"event": "note", "text": "watching has ended; the run goes on"}


def test_watching_finds_the_settings_of_the_run_that_is_going_on(recipe: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    overrides = ["stage.tokenizer.vocab_size=301", "alerts.notify=[]"]
    changed = load_recipe(recipe, overrides)
    tokenizer = next(iter(changed.stages.values()))
    names = [f"{tokenizer.kind}-0123"]
    log_run(store.root, recipe, changed.resolved(), names, overrides=changed.overrides, until=None, complete=False)
    assert running_overrides(store, recipe) == [], "nothing is locked"
    with store.lock(tokenizer, "0123", waiting=Waiting()):
        assert running_overrides(store, recipe) == overrides[:1], "an address of notices may hold a token"
        assert running_overrides(store, recipe.with_name("other.toml")) == []


@pytest.mark.parametrize(("done", "words"), [(1, "1s left"), (9, "1s left"), (10, None)])
def test_a_stage_that_is_not_done_is_never_said_to_have_no_time_left(done: int, words: str | None) -> None:
    eta = Eta()
    eta.seconds = 0.2
    shown = describe({"done": done, "total": 10, "unit": "rows"}, eta)
    assert shown == f"{done}/10 rows" + (f"  {words}" if words else "")


def test_the_time_left_begins_anew_with_each_part_that_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 10.0, 40.0, 40.0, 100.0])
    monkeypatch.setattr("runner.reporting.progress.time.monotonic", lambda: next(clock))
    eta, found = Eta(), []
    for unit, done in (
        ("rows of a", 0),
        ("rows of a", 8),
        ("rows of b", 0),
        ("rows of b", 4),
        ("rows of b", 1),
        ("rows of b", 5),
    ):
        eta.update({"unit": unit, "done": done, "total": 8})
        found.append(eta.seconds)
    # Of an evaluation's second task nothing is known at first, nor of the answers that it writes after it has read them.
    assert found == [None, 0.0, None, 30.0, None, 45.0]

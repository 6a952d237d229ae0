"""`import stockpot`: what the command line does, from Python."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_recipe import ALL_CACHED, Folder

import stockpot
from runner.planning.plan import Plan
from runner.reporting.events import NotebookView

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, list[dict[str, Any]], dict[str, str]]:
    """A recipe that was run from Python: its folder, the events, and the states of the last plan."""
    folder = Folder(tmp_path_factory.mktemp("api"))
    recipe = stockpot.load(folder.recipe, cache=folder.cache)
    events: list[dict[str, Any]] = []
    return folder, events, recipe.run(on_event=events.append).states


Ran = tuple[Folder, list[dict[str, Any]], dict[str, str]]


def test_a_run_tells_its_events_and_leaves_what_the_command_line_finds(ran: Ran) -> None:
    folder, events, states = ran
    assert states == ALL_CACHED == folder.states()
    assert events[0]["event"] == "planned" and events[-1] == {"event": "closed"}
    assert [event["stage"] for event in events if event["event"] == "finished"] == ["corpus", "tokenizer", "tokens"]
    recipe = stockpot.load(str(folder.recipe), cache=str(folder.cache))
    assert recipe.path("tokens") == folder.artifact("tokens")
    assert recipe.scores() == {} and repr(recipe) == "<recipe small: corpus, tokenizer, tokens>"


def test_plan_and_report_are_text_and_html(ran: Ran) -> None:
    folder, *_ = ran
    recipe = stockpot.load(folder.recipe, {"stage.tokenizer.vocab_size": 299}, cache=folder.cache)
    plan = recipe.plan()
    assert plan.states == {"corpus": "cached", "tokenizer": "run", "tokens": "waiting"}
    assert "vocab_size: 300 -> 299" in str(plan)
    page = plan._repr_html_()
    assert page.startswith("<svg") and "vocab_size: 300 -&gt; 299" in page
    report = recipe.report()
    assert "<html" in report.html() and report.markdown().startswith("# small")
    assert report._repr_html_().startswith("<iframe srcdoc=")


def test_a_notebook_shows_a_bar_and_what_is_finished(ran: Ran) -> None:
    folder, *_ = ran
    recipe = stockpot.load(folder.recipe, cache=folder.cache)
    plan: Plan = recipe._plan()
    pages: list[str] = []
    view = NotebookView(pages.append)
    view.planned(plan)
    assert pages[-1] == "corpus, tokenizer, tokens: cached"
    entry = plan.named("corpus")
    view.started(entry)
    view._shown = 0.0
    view.reported({"done": 5, "total": 20, "unit": "<rows>"})
    assert '<progress value="5" max="20"></progress> 5/20 &lt;rows&gt;' in pages[-1]
    view.note("a <note>")
    view.finished(entry, "done in 3s")
    view.close()
    assert "<progress" not in pages[-1] and "corpus: done in 3s" in pages[-1] and "a &lt;note&gt;" in pages[-1]


def test_errors_are_those_of_the_command_line(ran: Ran, tmp_path: Path) -> None:
    folder, *_ = ran
    with pytest.raises(stockpot.RecipeError, match="no such recipe"):
        stockpot.load("not-there")
    recipe = stockpot.load(folder.recipe, cache=tmp_path / "other")
    with pytest.raises(stockpot.StockpotError, match="expected a finished artifact, got the state 'run'"):
        recipe.path("corpus")
    with pytest.raises(stockpot.RecipeError, match="no stage 'x'; expected one of corpus"):
        recipe.path("x")
    with pytest.raises(stockpot.RecipeError, match="expected a finished model, got none"):
        recipe.chat("hello")


def test_importing_it_is_fast_and_the_module_is_the_command(ran: Ran) -> None:
    folder, *_ = ran
    code = (
        "import sys, stockpot; stockpot.load(sys.argv[1]).plan(); "
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "STOCKPOT_CACHE": str(folder.cache)}
    done = subprocess.run([sys.executable, "-c", code, str(folder.recipe)], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "stockpot", "path", str(folder.recipe), "tokens"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert Path(done.stdout.strip()) == folder.artifact("tokens")


def test_the_example_in_the_guide_runs(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *_ = ran
    (example,) = re.findall(
        r"```python\n(import stockpot.*?)```", (ROOT / "recipes" / "guide.md").read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(folder.root)
    monkeypatch.setenv("STOCKPOT_CACHE", str(folder.cache))
    (folder.root / "mine.toml").write_text(folder.recipe.read_text())
    made = example.replace('recipe.path("own")', 'recipe.path("tokens")').replace('{"stage.own.seed": 1}', '{"seed": 1}')
    made = "\n".join(line for line in made.splitlines() if "chat" not in line and "predict" not in line)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(made, {})

"""A recipe with its cache: plan, run, scores, folders, answers."""

import argparse
import contextlib
import datetime
import json
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import RecipeError
from runner.options import make_view, recipe_of, recipe_path, store_of
from runner.planning import outcomes
from runner.planning.plan import Plan
from runner.reporting.events import EventView, NotebookView

if TYPE_CHECKING:
    from llm.inference.chat_session import ChatSession
    from runner.reporting.progress import RunView
    from runner.reporting.report import RunReport

PAGE_PIXELS = 700  # height of a report in a notebook
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def load(
    recipe: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    cache: str | Path | None = None,
    allow: Sequence[str | Path] = (),
) -> "LoadedRecipe":
    """The recipe at a path, or of a name such as "quickstart"; RecipeError with all that is wrong in it.

    `settings` override fields: {"stage.base.seed": 1}. `allow` are folders besides its own that it may read.
    """
    overrides = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in (settings or {}).items()]
    return LoadedRecipe(
        argparse.Namespace(
            recipe=recipe_path(str(recipe)),
            overrides=overrides,
            allow_path=[Path(folder) for folder in allow],
            cache=None if cache is None else Path(cache),
        )
    )


class LoadedRecipe:
    """A recipe and its cache. What is asked of it is read from the cache each time."""

    def __init__(self, options: argparse.Namespace) -> None:
        """As the options of the command line say; use `load`."""
        self._options = options
        self._recipe, self._store = recipe_of(options), store_of(options)
        self._sessions: dict[str, ChatSession] = {}

    def __repr__(self) -> str:
        return f"<recipe {self.name}: {', '.join(self._recipe.stages)}>"

    @property
    def name(self) -> str:
        """Its name."""
        return self._recipe.head.name

    def plan(self, *, until: str | None = None) -> "ShownPlan":
        """The state of every stage and the reason."""
        return ShownPlan(Plan(self._recipe, self._store, until=until), self._store)

    def run(
        self,
        *,
        until: str | None = None,
        force: Sequence[str] = (),
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> "ShownPlan":
        """Run the stages whose results are not in the cache, as `run RECIPE` does; returns the last plan.

        `on_event` gets each event that `run --json` prints; without it, progress is shown: in a notebook as a bar.
        Interrupting the cell, or Ctrl-C, checkpoints and raises KeyboardInterrupt. StageError if a stage fails, GateError if a
        gate does.
        """
        from runner.execution.scheduler import Scheduler
        from runner.execution.stop import StopRequest

        stop = StopRequest()
        with _signals(stop.install), contextlib.closing(self._view(on_event)) as view:
            last = Scheduler(self._recipe, self._store, view, stop).run(until=until, force=force)
        return ShownPlan(last, self._store)

    def scores(self) -> dict[str, dict[str, float]]:
        """By finished evaluation, its scores."""
        found = {entry.name: entry.record.data["metrics"].get("scores") for entry in self._plan() if entry.record}
        return {name: dict(scores) for name, scores in found.items() if scores}

    def path(self, stage: str) -> Path:
        """The folder of a finished stage; RecipeError if there is none."""
        if stage not in (known := dict.fromkeys([*self._recipe.written, *self._recipe.stages])):
            raise RecipeError(f"{self._recipe.path}: no stage {stage!r}; expected one of {', '.join(known)}")
        entry = self._plan().named(stage)
        if entry.path is None:
            raise RecipeError(f"{stage}: expected a finished artifact, got the state {entry.state!r}")
        return entry.path

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        stage: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The answer of a model, by default the last finished one, to a question or a list of {role, content}."""
        from llm.inference.chat_session import AnswerOptions
        from llm.inference.sampling import Sampling

        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        options = AnswerOptions(max_new_tokens=max_new_tokens, sampling=Sampling(temperature=temperature, seed=seed))
        return "".join(self._session(stage).answer(turns, options).pieces)

    def predict(
        self,
        *data: str | Path,
        stage: str | None = None,
        task: str | None = None,
        prompt: str | None = None,
        text: str | None = None,
        max_new_tokens: int | None = None,
    ) -> list[dict[str, Any]]:
        """For each row of files its fields and what a model predicts, as `run predict` does; for many rows use that.

        A task of the recipe's evaluations says what, by default the first of labels; or `prompt`, a template to answer; or
        `text`, a field whose likelihood is told.
        """
        from runner.commands import predict

        asked = {"stage": stage, "task": task, "prompt": prompt, "text": text, "max_new_tokens": max_new_tokens}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "predicted.jsonl")
            files = [Path(path) for path in data]
            predict.main(argparse.Namespace(**vars(self._options), **asked, data=files, out=out))
            return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    def report(self) -> "Report":
        """Scores, curves, data and cost on one page; in a notebook it is shown."""
        from runner.reporting.report import RunReport

        return Report(RunReport(self._recipe, self._plan(), now=datetime.datetime.now(datetime.UTC)))

    def _plan(self) -> Plan:
        return Plan(self._recipe, self._store)

    def _session(self, stage: str | None) -> "ChatSession":
        """The model of a stage, loaded once for each artifact."""
        from runner.serving.models import servable_models

        (model,) = servable_models(self._recipe, self._plan(), [stage] if stage else [])
        key = f"{model.checkpoint} {model.adapter}"
        if key not in self._sessions:
            self._sessions[key] = model.open(precision=self._recipe.head.parallel.precision)
        return self._sessions[key]

    def _view(self, on_event: Callable[[dict[str, Any]], None] | None) -> "RunView":
        if on_event is not None:
            return EventView(on_event)
        if "ipykernel" in sys.modules:
            from IPython.display import HTML, display

            handle = display(HTML(""), display_id=True)
            return NotebookView(lambda page: handle.update(HTML(page)))
        from runner.planning.cost import expected_seconds

        return make_view(lambda: expected_seconds(self._recipe, self._store))


class ShownPlan:
    """A plan as text, or in a notebook as a graph and a table."""

    def __init__(self, plan: Plan, store: Any) -> None:
        """Of a plan made from the cache `store`."""
        from runner.planning.cost import costs, kinds_ahead

        self._plan = plan
        self._costs = costs(plan, store.records(kinds_ahead(plan)))

    @property
    def states(self) -> dict[str, str]:
        """By stage, its state: cached, run, resume, waiting, push, skipped or paused."""
        return {entry.name: entry.state for entry in self._plan}

    def __str__(self) -> str:
        from runner.commands.plan import table

        return "\n".join([*table(self._plan, self._costs), *outcomes.attempts(self._plan)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from runner.reporting.graph_drawing import as_svg

        return f"{as_svg(self._plan)}<pre>{escape(str(self))}</pre>"


class Report:
    """The report on a recipe."""

    def __init__(self, report: "RunReport") -> None:
        self._report = report

    def html(self) -> str:
        """The self-contained page."""
        from runner.reporting.report import as_html

        return as_html(self._report)

    def markdown(self) -> str:
        """The same without plots."""
        from runner.reporting.report import as_markdown

        return as_markdown(self._report)

    def _repr_html_(self) -> str:
        # In a frame of its own, so that the styles of the page stay there; it runs no scripts.
        return f'<iframe srcdoc="{escape(self.html())}" style="width:100%;height:{PAGE_PIXELS}px;border:0" sandbox></iframe>'


@contextlib.contextmanager
def _signals(install: Callable[[], None]) -> Iterator[None]:
    """Signals handled as `install` says, where that is possible: in the main thread. What was before comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

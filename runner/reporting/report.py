"""The report on a recipe: its scores, curves, data and cost on one self-contained page, or as Markdown.

It is made from the cache alone, in any state of the recipe; what is not finished is left out. The page loads nothing from
elsewhere, and all text from data and models is escaped.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.artifacts import METRICS, Scores
from runner.hub.class_scores import ClassScores, class_scores
from runner.hub.model_card import learned_from
from runner.planning import outcomes
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.reporting.confusion_matrix import confusion_svg
from runner.reporting.graph_drawing import as_svg as graph_svg
from runner.reporting.progress import duration
from runner.reporting.score_meanings import meaning
from runner.tracking.curves import as_svg, read_curves, whole_of

PAGES = Path(__file__).parents[1] / "pages"
SAMPLES, WRONG = 8, 12  # of each task
WIDEST_GRAPH = 1056  # pixels; a wider one is drawn smaller
MAX_CHARACTERS = 500  # of a quoted text
# The plots of a training: title, names of metrics, and whether the axis is logarithmic.
PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss, nats per token", ("loss", "validation_loss"), False),
    ("learning rate", ("learning_rate",), False),
    ("gradient norm", ("gradient_norm",), True),
    ("tokens/s", ("tokens_per_second",), False),
)


@dataclass(frozen=True)
class Table:
    """A table of text with a title and a head."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ByClass:
    """The scores by label of one task of one evaluation."""

    title: str  # stage: task
    classes: Table
    confusion: Table | None
    picture: str  # the confusion matrix as SVG


@dataclass(frozen=True)
class Sample:
    """One example of a task: the prompt, the expected answer, and the answer of each evaluated model."""

    prompt: str
    expected: str
    answers: Mapping[str, str]  # by stage


class RunReport:
    """Everything that the cache knows about a recipe: the contents of the page, in its order."""

    def __init__(self, recipe: Recipe, plan: Plan, *, now: datetime.datetime) -> None:
        finished = [entry for entry in plan if entry.record is not None]
        evaluations = [entry for entry in finished if issubclass(entry.stage.makes, Scores)]
        missing = [entry.name for entry in plan if entry.record is None and not plan.is_needless(entry.name)]
        self.name, self.description = recipe.head.name, recipe.head.description
        self.made = now.strftime("%Y-%m-%d %H:%M UTC")
        self.state = f"not finished: {', '.join(missing)}" if missing else "finished"
        self.graph = graph_svg(plan)
        self.graph_width = min(WIDEST_GRAPH, int(self.graph.split('width="', 1)[1].split('"', 1)[0]))  # pixels
        self.verdicts = [(verdict.passed, f"{entry.name}: {verdict}") for entry in plan for verdict in entry.verdicts]
        self.scores = _scores(evaluations)
        self.by_class = [_by_class(entry, found) for entry in evaluations for found in _class_scores(entry)]
        self.plots = _plots(finished)
        self.samples = _examples(evaluations, wrong=False)
        self.wrong = _examples(evaluations, wrong=True)
        self.attempts = outcomes.attempts(plan)
        self.settings = _settings(plan)
        cut = Table("Rows that were cut", ["stage", "rows"], outcomes.cut_rows(finished))
        tables = (_tokenizers(finished), _data(recipe, finished), cut, _cost(finished))
        self.tables = [table for table in tables if table.rows]


def as_html(report: RunReport) -> str:
    """One self-contained page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(report=report)


def as_markdown(report: RunReport) -> str:
    """The same without plots."""
    parts = [f"# {report.name}", report.description, f"{report.state}; {report.made}"]
    parts += [f"* {text}" for _, text in report.verdicts]
    if report.attempts:
        parts += ["## Attempts", "```\n" + "\n".join(report.attempts).strip() + "\n```"]
    for table in [*filter(None, [report.settings, report.scores]), *report.tables]:
        parts += [f"## {table.title}", _markdown(table)]
    for one in report.by_class:
        parts += [f"## {table.title}\n\n{_markdown(table)}" for table in (one.classes, one.confusion) if table]
    for title, groups in (("Answers", report.samples), ("Wrong", report.wrong)):
        for task, samples in groups.items():
            rows = [[sample.prompt, sample.expected, *sample.answers.values()] for sample in samples]
            names = list(samples[0].answers) if samples else []
            parts += [f"## {title}: {task}", _markdown(Table(task, ["prompt", "expected", *names], rows))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(plan: Plan) -> Table | None:
    sweep = plan.recipe.sweep
    if sweep is None:
        return None
    head, *rows = outcomes.sweep_rows(plan, sweep)
    return Table(f"Settings, {sweep.criterion}", head, rows)


def _scores(evaluations: Sequence[Entry]) -> Table | None:
    rows = outcomes.score_table(evaluations)
    return Table("Scores", [*rows[0], "meaning"], [[*row, meaning(row[0])] for row in rows[1:]]) if rows else None


def _class_scores(entry: Entry) -> list[ClassScores]:
    return list(class_scores(entry.record.data["metrics"])) if entry.record else []


def _by_class(entry: Entry, found: ClassScores) -> ByClass:
    title, confusion = f"{entry.name}: {found.task}", found.confusion_table
    return ByClass(
        title,
        Table(f"By class: {title}", found.classes[0], found.classes[1:]),
        Table(f"Confusion: {title}", confusion[0], confusion[1:]) if confusion else None,
        confusion_svg(found.labels, found.confusion) if confusion else "",
    )


def _plots(finished: Sequence[Entry]) -> dict[str, list[str]]:
    """The plots of each training as SVG, by stage."""
    shown = {name for _, names, _ in PANELS for name in names}
    found = {}
    for entry in finished:
        if not entry.stage.trains or entry.path is None or not (entry.path / METRICS).exists():
            continue
        curves = read_curves(entry.path / METRICS, shown)
        found[entry.name] = [
            as_svg(
                {name: curve for name, curve in curves.items() if whole_of(name) in names},
                title=title,
                logarithmic=logarithmic,
            )
            for title, names, logarithmic in PANELS
            if any(name in curves for name in names)
        ]
    return {name: plots for name, plots in found.items() if plots}


def _examples(evaluations: Sequence[Entry], *, wrong: bool) -> dict[str, list[Sample]]:
    """By task: the answers of all models to the same prompts, or the wrong answers of the last model."""
    tasks: dict[str, dict[Any, Sample]] = {}
    chosen = evaluations[-1:] if wrong else evaluations
    for entry in chosen:
        if entry.path is None:
            continue
        for line in Scores(entry.path).errors.read_text(encoding="utf-8").splitlines():
            example = json.loads(line)
            if ("nats_behind" in example) != wrong or "found" not in example:
                continue
            samples = tasks.setdefault(str(example["task"]), {})
            if example["row"] not in samples and len(samples) >= (WRONG if wrong else SAMPLES):
                continue
            new = Sample(_short(example["prompt"]), _short(example["wanted"]), {})
            sample = samples.get(example["row"], new)
            sure = f" ({100 * example['probability']:.3g}% sure)" if "probability" in example else ""
            answers = {**sample.answers, entry.name: _short(example["found"]) + sure}
            samples[example["row"]] = replace(sample, answers=answers)
    return {task: list(samples.values()) for task, samples in tasks.items()}


def _tokenizers(finished: Sequence[Entry]) -> Table:
    rows = []
    for entry in finished:
        if entry.stage.kind == "tokenizer" and entry.record is not None:
            metrics = entry.record.data["metrics"]
            per_token = ", ".join(f"{name} {value:.2f}" for name, value in metrics["bytes_per_token"].items())
            trips = metrics["round_trip"]
            rows.append(
                [entry.name, f"{metrics['vocab_size']:,}", per_token, f"{trips['failures']} of {trips['sentences']:,}"]
            )
    return Table("Tokenizer", ["stage", "tokens", "bytes per token", "sentences changed by encoding"], rows)


def _data(recipe: Recipe, finished: Sequence[Entry]) -> Table:
    rows = [
        line
        for entry in finished
        if entry.record is not None
        for line in learned_from(entry.name, entry.record.data, recipe.fields_of(entry.stage))
    ]
    return Table("Data", ["stage", "data", "rows", "licences", "origins"], rows)


def _cost(finished: Sequence[Entry]) -> Table:
    rows = []
    for entry in finished:
        assert entry.record is not None  # finished
        metrics = entry.record.data["metrics"]
        memory = metrics.get("peak_memory_bytes")
        rows.append(
            [
                entry.name,
                entry.stage.kind,
                duration(float(entry.record.data["seconds"])),
                f"{metrics['tokens']:,}" if isinstance(metrics.get("tokens"), int) and entry.stage.trains else "",
                f"{metrics['flops']:.2e}" if metrics.get("flops") else "",
                f"{memory / 2**30:.2f} GiB" if memory else "",
            ]
        )
    total = sum(float(entry.record.data["seconds"]) for entry in finished if entry.record)
    rows.append(["all", "", duration(total), "", "", ""])
    return Table("Cost", ["stage", "kind", "time", "tokens", "operations", "peak memory"], rows if finished else [])


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "…"


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(table.head), line(["---"] * len(table.head)), *map(line, table.rows)])

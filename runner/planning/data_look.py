"""A look at the rows that stages will read, before anything runs: what would fail at a late stage is told at once.
What the machine lacks for a stage is told with it.

For every table of data of a stage that is not finished, the first rows and some of the others become what the stage will make
of them, without tokens. All faults are reported together, with counts. It is done only when a recipe is about to run, since
data of a stranger is not parsed before the user agrees.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llm.errors import InputError
from llm.text.readers import FileFormat, field_names, read_rows
from llm.text.readers.sample import Sample
from llm.text.templates import split_text, text_of
from runner.errors import RecipeError
from runner.graph import tables
from runner.input_files import InputFile
from runner.planning.plan import Plan
from runner.recipe.validation import nearest
from runner.stage import Stage
from runner.stages.corpus import MakeCorpus, SourceSpec
from runner.stages.fields.data_mix import MixTable
from runner.stages.fields.data_tables import NO_LABEL, PreferenceTable, RowTable
from runner.stages.fields.eval_tasks.multiple_choice import MultipleChoiceTask
from runner.stages.fields.eval_tasks.questions import ChatTask, ClassificationTask, TextTask
from runner.stages.fields.reading import PartOfRows, form_of

AHEAD = ("run", "resume", "waiting", "paused")
Chats = Sequence[Sequence[Any]]  # turns of `llm.data.conversations`


class Table(NamedTuple):
    """Rows that a stage reads, and what it makes of each."""

    place: str  # stage.chat.data[0]
    files: InputFile
    form: FileFormat
    fields: frozenset[str]  # that rows must have
    columns: frozenset[str] | None  # that are read; None: all
    use: Callable[[Mapping[str, Any]], Chats]  # InputError for a row that cannot be used
    skips: bool  # whether rows that cannot be used are left out
    labels: frozenset[str] | None = None  # that a row may have; empty: any, but at least two of them
    has_several_labels: bool = False


def check_data(plan: Plan, note: Callable[[str], None]) -> None:
    """RecipeError with all that is wrong in data of stages that will run; `note` gets what they leave out."""
    names = [entry.name for entry in plan if entry.state in AHEAD]
    stages = {entry.name: entry.stage for entry in plan}
    faults: list[str] = []
    left_out: dict[str, list[str]] = {}  # places by sentence: a recipe names the same rows in several tables
    done: set[tuple[Any, ...]] = set()  # evaluations share tables
    check_artifacts(plan)
    for name in names:
        faults += [f"stage.{name}.{lack}" for lack in stages[name].lacks()]
        for table in data_tables(name, stages):
            what = (table.files.pattern, table.form, table.fields, table.skips, repr(table.use), table.labels)
            if what not in done:
                done.add(what)
                for fault in look(table):
                    if fault.is_left_out:
                        left_out.setdefault(fault.sentence, []).append(table.place)
                    else:
                        faults.append(f"{table.place}: {fault.sentence}")
    for sentence, places in left_out.items():
        note(f"{places[0]}{f' and {len(places) - 1} other tables' if len(places) > 1 else ''}: {sentence}")
    if faults:
        raise RecipeError("\n".join(f"{plan.recipe.path}: {fault}" for fault in faults))


def check_artifacts(plan: Plan) -> None:
    """RecipeError with what finished stages made that a stage which will run cannot use."""
    stages = {entry.name: entry.stage for entry in plan}
    made = {entry.name: entry.path for entry in plan if entry.path is not None}
    ahead = [entry for entry in plan if entry.state in AHEAD]
    faults = [f"stage.{entry.name}.{fault}" for entry in ahead for fault in entry.stage.faults_given(stages, made)]
    if faults:
        raise RecipeError("\n".join(f"{plan.recipe.path}: {fault}" for fault in faults))


class Fault(NamedTuple):
    """What is wrong with the rows of a table."""

    sentence: str
    is_left_out: bool = False  # as the recipe asks


def look(table: Table, files: Sequence[Path] | None = None) -> Iterator[Fault]:
    """What is wrong with the rows of a table; the files may be given."""
    paths = table.files.matches() if files is None else files
    if not paths:  # on the Hub, or missing, which is told elsewhere
        return
    found = _fields(paths[0], table.form)
    if found is not None and (missing := sorted(table.fields.difference(found))) and not table.skips:
        yield Fault(
            f"expected the field {missing[0]!r} in the rows of {paths[0]}, got only "
            f"{', '.join(map(repr, found)) or 'no field at all'}{nearest(missing[0], found)}"
        )
        return
    columns = None if table.columns is None else set(table.columns)
    sample, faults, first, labels = Sample(paths, columns, table.form), Counter[str](), dict[str, str](), set[str]()
    rows = 0
    try:
        for row in sample:
            rows += 1
            try:
                chats = table.use(row.fields())
                _check_label(table, chats, labels)
            except InputError as error:
                reason = str(error).partition(", got ")[0]
                faults[reason] += 1
                first.setdefault(reason, f"{row.at}: {error}")
    except (InputError, OSError) as error:
        yield Fault(str(error))
        return
    yield from _told(table, sample, rows, faults, first)
    if table.form.split and sample.is_whole and rows and not any(True for _ in read_rows(paths, None, table.form)):
        yield Fault(
            f"split: expected rows in the part {table.form.split.part!r}, got none of {rows:,}; take more, or a larger share"
        )
    if table.labels is not None and sample.is_whole and len(labels) == 1 and not faults:
        yield Fault(
            f"expected rows of at least two distinct labels to choose from, got {labels.pop()!r} alone in {rows:,} rows"
        )


def _told(table: Table, sample: Sample, rows: int, faults: Counter[str], first: Mapping[str, str]) -> Iterator[Fault]:
    of = f"{rows:,} rows" if sample.is_whole else f"the {rows:,} rows that were looked at"
    bad = faults.total()
    if sample.is_whole and bad == rows and not (rows and not table.skips):
        reason = f"; the first is {next(iter(first.values()))}" if first else ""
        yield Fault(f"expected rows that can be used, got none in {of}{reason}")
        return
    for reason, count in faults.most_common():
        cure = " and are left out" if table.skips else '; on_bad_row = "skip" leaves them out'
        yield Fault(f"{count:,} of {of} cannot be used{cure}. First {first[reason]}", table.skips)


def _check_label(table: Table, chats: Chats, labels: set[str]) -> None:
    """InputError for a row to classify whose label is not among those of the task; a label is added to `labels`."""
    if table.labels is None:
        return
    for label in (turns[-1].content for turns in chats):  # several, if a row may have several
        if table.labels and label not in table.labels and not (label == NO_LABEL and table.has_several_labels):
            raise InputError(f"expected one of the labels {', '.join(sorted(table.labels))}, got {label!r}")
        if len(labels) < 2:
            labels.add(label)


def _fields(path: Path, form: FileFormat) -> list[str] | None:
    """The fields of the first row; None if it cannot be read, which is told with its place."""
    try:
        return field_names(path, form)
    except (InputError, OSError, ValueError):
        return None


def data_tables(name: str, stages: Mapping[str, Stage]) -> Iterator[Table]:
    """The tables of rows of a stage that lie in files."""
    stage = stages[name]
    for field, table in tables(stage):
        place = f"stage.{name}.{field}"
        match table:
            case SourceSpec(files=InputFile() as files):
                fields = frozenset({*split_text(table.text)[1::2], *table.where, *_split_fields(table.part)})
                skips = isinstance(stage, MakeCorpus) and stage.on_bad_row == "skip"
                yield Table(place, files, form_of(table.read, table.part), fields, fields, _Document(table), skips)
            case TextTask() | RowTable() | PreferenceTable() | MultipleChoiceTask() | MixTable(files=InputFile()):
                template, skips = table.template, table.on_bad_row == "skip"
                labels = None
                if isinstance(table, ClassificationTask):
                    words = table.words
                    labels = frozenset(words.get(label, label) for label in table.labels or ())
                use = _Chats(template, isinstance(table, ChatTask))
                assert table.files is not None
                yield Table(
                    place,
                    table.files,
                    template.form,
                    frozenset(template.fields) | _split_fields(table.split),
                    None if template.columns is None else frozenset(template.columns) | _split_fields(table.split),
                    use,
                    skips,
                    labels,
                    getattr(table, "multi_label", None) is not None,
                )


def _split_fields(split: PartOfRows | None) -> frozenset[str]:
    return frozenset(split.fields if split else ())


@dataclass(frozen=True)
class _Document:
    """What a corpus makes of a row; equal for equal sources."""

    source: SourceSpec

    def __call__(self, row: Mapping[str, Any]) -> Chats:
        if all(row.get(name) == value for name, value in self.source.where.items()):
            text_of(row, split_text(self.source.text))
        return []


@dataclass(frozen=True)
class _Chats:
    """What a training or a task makes of a row; equal for equal tables."""

    template: Any  # with `chats`
    is_scored: bool  # whether the last turn is scored

    def __call__(self, row: Mapping[str, Any]) -> Chats:
        chats: Chats = self.template.chats(row)
        for turns in chats:
            if self.is_scored and turns[-1].role != "assistant":
                raise InputError(f"expected the assistant's turn last, the answer to score, got the {turns[-1].role}'s")
        return chats

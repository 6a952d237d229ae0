"""What a task file for lm-eval may say: texts, templates, numbers and the names of lm-eval's own metrics and filters.

lm-eval takes much more from such a file, some of it code or a way to it: tags and `process_*` name functions, options of
generation reach Transformers (`custom_generate`, `trust_remote_code`), and unknown metrics are fetched from the Hub. So each
table has a fixed set of keys, at every depth.
"""

import re
import re._constants as regex_codes  # type: ignore[import-not-found]  # has no stubs
import re._parser as regex_parser  # type: ignore[import-not-found]  # has no stubs
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from llm.errors import InputError
from llm.evaluation.lm_eval_templates import bounded_template

SUFFIXES = (".yaml", ".yml")
MOST_BYTES = 2**20  # of a task file
MOST_DEPTH = 100  # of brackets in it
UNBOUNDED = 1000  # repeats of a regular expression from which on they count as any number


def _steady(pattern: str) -> str:
    """A regular expression whose time does not explode with the length of an answer: no repeat inside of a repeat."""
    try:
        parsed = regex_parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"expected a regular expression: {error}") from error
    if _repeats(parsed) > 1:
        raise ValueError(f"expected a regular expression without a repeat inside of a repeat, got {pattern!r:.80}")
    return pattern


def _repeats(parsed: Any) -> int:
    """How deep unbounded repeats of a parsed expression are nested."""
    deepest = 0
    for code, argument in parsed:
        inner = max((_repeats(part) for part in _parts(argument)), default=0)
        if code in (regex_codes.MAX_REPEAT, regex_codes.MIN_REPEAT, regex_codes.POSSESSIVE_REPEAT):
            inner += argument[1] is regex_codes.MAXREPEAT or argument[1] > UNBOUNDED
        deepest = max(deepest, inner)
    return deepest


def _parts(argument: Any) -> list[Any]:
    """The expressions inside of an operation's argument."""
    if isinstance(argument, regex_parser.SubPattern):
        return [argument]
    return [part for one in argument for part in _parts(one)] if isinstance(argument, list | tuple) else []


Text = Annotated[str, StringConstraints(max_length=100_000)]
Template = Annotated[Text, AfterValidator(bounded_template)]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.+-]{1,100}$")]
Regex = Annotated[str, StringConstraints(max_length=1000), AfterValidator(_steady)]
Count = Annotated[int, Field(ge=0, le=10_000)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metric(_Table):
    """A metric of lm-eval and its options."""

    metric: Name
    aggregation: Name | None = None
    higher_is_better: bool | None = None
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    ignore_numbers: bool | None = None
    regexes_to_ignore: list[Regex] | None = None


class FilterStep(_Table):
    """A filter of lm-eval and its options."""

    function: Name
    regex_pattern: Regex | None = None
    group_select: int | None = None
    fallback: Text | None = None
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    regexes_to_ignore: list[Regex] | None = None
    mapping_dict: dict[Text, Text] | None = None
    default_value: Text | None = None
    k: Count | None = None


class Filters(_Table):
    """Filters one after the other, and the name of the score after them."""

    name: Name
    filter: list[FilterStep]


class Generation(_Table):
    """How answers are generated."""

    until: Text | list[Text] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    max_gen_toks: Count | None = None


class DataFiles(_Table):
    """The files of a task, all in its folder."""

    data_files: Any


class TaskFile(_Table):
    """One task."""

    task: Name
    task_alias: Text | None = None
    tag: Name | list[Name] | None = None
    dataset_path: Literal["json", "csv", "parquet", "text"]
    dataset_name: Name | None = None
    dataset_kwargs: DataFiles
    training_split: Name | None = None
    validation_split: Name | None = None
    test_split: Name | None = None
    fewshot_split: Name | None = None
    doc_to_text: Template | None = None
    doc_to_target: Template | int | None = None
    doc_to_choice: Template | list[Text] | None = None
    output_type: Literal["loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until"] | None = None
    description: Template | None = None
    target_delimiter: Text | None = None
    fewshot_delimiter: Text | None = None
    gen_prefix: Template | None = None
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    repeats: Annotated[int, Field(ge=1, le=1000)] | None = None
    metric_list: list[Metric] | None = None
    generation_kwargs: Generation | None = None
    filter_list: list[Filters] | None = None
    metadata: dict[Name, Text | int | float | bool] | None = None


def local_task(folder: Path, name: str) -> dict[str, Any]:
    """The task `name` of the YAML files in `folder`, with absolute paths of its data files; InputError if it is not only
    data."""
    found: dict[str, Path] = {}
    tables: dict[str, Any] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        table = read_yaml(path)
        if not isinstance(table, dict) or not isinstance(table.get("task"), str):
            raise InputError(f"{path}: task: expected the name of the task, got none")
        found[table["task"]], tables[table["task"]] = path, table
    if name not in found:
        raise InputError(f"{folder}: expected the task {name!r}, got only {', '.join(sorted(found)) or 'no tasks'}")
    path = found[name]
    try:
        task = TaskFile.model_validate(tables[name])
    except ValidationError as error:
        raise InputError(f"{path}: {_fault(error)}") from None
    return task.model_dump(exclude_unset=True) | {
        "dataset_kwargs": {"data_files": _located(task.dataset_kwargs.data_files, path)}
    }


def _fault(error: ValidationError) -> str:
    """The first fault, with its place."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"] if part not in ("str", "int"))
    if fault["type"] == "extra_forbidden":
        return f"{place}: expected a key that holds data and is known here, got another; remove it"
    told = (
        str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"].replace("Input should be", "expected")
    )
    return f"{place}: {told}, got {repr(fault['input'])[:80]}"


def read_yaml(path: Path) -> Any:
    """The plain data in a YAML file: no tags, which name code, no aliases, which grow without bound, and not much of it."""
    import yaml

    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path}: expected at most {MOST_BYTES:,} bytes, got {path.stat().st_size:,}")
    try:
        text = path.read_text(encoding="utf-8")
        if _depth(text) > MOST_DEPTH:
            raise InputError(f"{path}: expected brackets at most {MOST_DEPTH} deep, got more")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise InputError(f"{path}: expected YAML without aliases, got one; write the value out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: expected YAML without tags such as !function, which name code, got {error}") from error


def _depth(text: str) -> int:
    """How deep brackets are nested, roughly: those in quotes count. PyYAML's time grows with the square of it."""
    return max(accumulate((character in "[{") - (character in "]}") for character in text), default=0)


def _located(files: Any, path: Path) -> Any:
    """Names of data files as absolute paths; InputError if one is outside the task file's folder, links resolved."""
    match files:
        case dict():
            return {str(split): _located(one, path) for split, one in files.items()}
        case list():
            return [_located(one, path) for one in files]
        case str() if not set("*?[") & set(files) and "\0" not in files:
            located = (path.parent / files).resolve()
            if located.is_relative_to(path.parent.resolve()) and located.is_file():
                return str(located)
    raise InputError(f"{path}: data_files: expected names of files in the folder of the task file, got {repr(files)[:80]}")


def check_names(config: Mapping[str, Any], benchmark: str) -> None:
    """InputError for metrics and filters that lm-eval does not have: it would fetch such a metric from the Hub, as code."""
    import lm_eval.api.metrics
    import lm_eval.filters  # noqa: F401  # importing registers
    from lm_eval.api.registry import aggregation_registry, filter_registry, metric_registry

    metrics = config.get("metric_list") or ()
    steps = [step for one in config.get("filter_list") or () for step in one["filter"]]
    wanted = [("metric", one["metric"], metric_registry) for one in metrics]
    wanted += [("aggregation", one["aggregation"], aggregation_registry) for one in metrics if "aggregation" in one]
    wanted += [("function", step["function"], filter_registry) for step in steps]
    for field, value, known in wanted:
        if value not in known or value == "custom":
            raise InputError(f"lm_eval:{benchmark}: {field}: expected one of lm-eval's own, got {value!r}")

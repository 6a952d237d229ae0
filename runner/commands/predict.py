"""`run predict RECIPE DATA...`: labels, answers or likelihoods for rows of files."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import RecipeError
from runner.options import add_recipe_argument, add_stage_argument, recipe_of, store_of

if TYPE_CHECKING:
    from llm.errors import InputError
    from llm.text.readers import FileFormat
    from runner.serving.models import ServableModel
    from runner.serving.predictions import Prediction, Task

TOGETHER = 512  # rows that are predicted, and kept, at once
SECONDS = 5.0  # between two lines of progress


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    sub.add_argument("data", nargs="+", type=Path, metavar="DATA", help="files of rows, in any format that a recipe reads")
    add_stage_argument(sub, "--stage", help="the stage whose model predicts (default: the last finished one)")
    sub.add_argument("--task", metavar="NAME", help="a task of the recipe's evaluations (default: the first of labels)")
    sub.add_argument("--prompt", metavar="TEMPLATE", help='instead of a task: answer prompts such as "Why?\\n{text}"')
    sub.add_argument("--text", metavar="FIELD", help="instead of a task: the likelihood of this field, or template")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="length limit of an answer (default: the task's, or 128)")
    sub.add_argument(
        "--out", type=Path, metavar="FILE", help="*.csv, *.jsonl or *.parquet (default: JSON lines to the output)"
    )


def main(options: argparse.Namespace) -> int:
    """Predicts for each row of DATA: a label with calibrated probabilities, an answer, or a likelihood.

    A task of the recipe's evaluations says which, and how a row becomes a prompt. With --out, a run that was stopped goes on.
    """
    from llm.errors import InputError
    from runner.planning.plan import Plan
    from runner.serving.models import servable_models
    from runner.serving.predicted_rows import PredictedRows

    recipe, store = recipe_of(options), store_of(options)
    (model,) = servable_models(recipe, Plan(recipe, store), [options.stage] if options.stage else [])
    task = _task(recipe, options)
    _say(f"predicts by the model of the stage {model.name!r}, for the task {task.name!r}")
    for path in options.data:
        if not path.is_file():
            raise RecipeError(f"{path}: expected a file of rows, got none")
    about = {
        "model": [model.checkpoint.name, model.adapter.name if model.adapter else None],
        "task": [repr(task), options.max_new_tokens],
        "data": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in options.data],
    }
    with PredictedRows(options.out, about) if options.out else nullcontext() as out:
        try:
            prediction = _opened(model, task, recipe.head.parallel.precision, options.max_new_tokens)
            done = _run(prediction, options.data, task, out)
        except InputError as error:
            raise RecipeError(str(error)) from error
        except KeyboardInterrupt:
            if out is not None:
                _say(f"stopped; what is done is kept in {out.part}, and the same command goes on")
            raise
        if out is not None:
            out.finish()
            _say(f"{done:,} rows in {out.path}")
    return 0


def _task(recipe: Any, options: argparse.Namespace) -> "Task":
    """The task that the options name, or make."""
    from runner.serving.predictions import asked_task, task_of

    given = [name for name in ("task", "prompt", "text") if getattr(options, name) is not None]
    if len(given) > 1:
        raise RecipeError(f"--{given[1]}: expected one of --task, --prompt and --text, got also --{given[0]}")
    if options.prompt is not None or options.text is not None:
        return asked_task(prompt=options.prompt, text=options.text, file=options.data[0])
    task = task_of(recipe, options.task)
    if task is None:
        raise RecipeError(
            f"{recipe.path}: expected an evaluation with a task of labels, answers or text, got none; say what to predict "
            "with "
            '--prompt "{field}" or --text FIELD'
        )
    return task


def _opened(model: "ServableModel", task: "Task", precision: Any, max_new_tokens: int | None) -> "Prediction":
    """The model, ready to predict; imports torch."""
    from runner.serving.predictions import prediction_of

    return prediction_of(task, model.predictor(precision=precision), _say, max_new_tokens=max_new_tokens)


def _run(prediction: "Prediction", data: Sequence[Path], task: "Task", out: Any) -> int:
    """Predicts for all rows but those that `out` has; the number of all rows."""
    from runner.serving.predictions import needed_fields, predicted

    rows = _rows(data, needed_fields(prediction.template), task.template.form)
    done = first = out.done if out is not None else 0
    if first:
        _say(f"{first:,} rows were done before")
        next(islice(rows, first - 1, first), None)
    began = told = time.monotonic()
    while some := list(islice(rows, TOGETHER)):
        found = predicted(prediction, some)
        if not done and all("error" in row for row in found):
            raise RecipeError(
                f"{data[0]}: {found[0]['error']}; so all of {len(found):,} rows; --prompt or --text names fields"
            )
        if out is None:
            sys.stdout.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in found)
            sys.stdout.flush()
        else:
            out.add(found)
        done += len(found)
        if (now := time.monotonic()) - told > SECONDS:
            told = now
            _say(f"{done:,} rows, {(done - first) / (now - began):,.0f} a second")
    if done == first == 0:
        raise RecipeError(f"{data[0]}: expected rows, got none")
    if done > first:
        _say(f"{done - first:,} rows predicted, {(done - first) / (time.monotonic() - began):,.0f} a second")
    return done


def _rows(data: Sequence[Path], fields: set[str], form: "FileFormat") -> "Iterator[Mapping[str, Any] | InputError]":
    """The rows of the files with all their fields, or why one cannot be read."""
    from dataclasses import replace

    from llm.errors import InputError
    from llm.text.readers import field_names, format_of, read_rows

    whole = replace(form, split=None)  # of the rows to predict for, all
    for path in data:
        needed = fields | set(field_names(path, whole)) if format_of(path) == ".parquet" else fields
        for row in read_rows([path], needed, whole):
            try:
                yield row.fields()
            except InputError as error:
                yield InputError(f"{row.at}: {error}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

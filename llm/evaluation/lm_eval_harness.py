"""Runs EleutherAI's lm-eval on a model folder: its own benchmarks, and tasks from YAML files.

A task file may come from anyone: `llm.evaluation.lm_eval_tasks` takes only data from it, and templates are rendered in Jinja's
sandbox. Metrics that `evaluate` would fetch from the Hub, as code, are refused, also those of lm-eval's own tasks. The package
is an extra: `pip install 'stockpot[lm-eval]'`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llm.device import Precision
from llm.errors import InputError
from llm.evaluation.bootstrap import DIGITS, resample
from llm.evaluation.lm_eval_logits import with_late_logits
from llm.evaluation.lm_eval_tasks import SUFFIXES, check_names, local_task
from llm.evaluation.scoring import Outcome
from llm.inference.batches import Limits, memory_for_batch
from llm.inference.likelihood import ACTIVATION_BYTES
from llm.inference.processes import ALONE
from llm.models.interface import dtype_of
from llm.tokenizer.stock_template import with_bounded_template

LM_EVAL_ROWS = 8  # rows of a batch at most
LM_EVAL_LENGTH = 2048  # tokens of a row that memory is reckoned for; few benchmarks have longer ones


def evaluate_folder(
    folder: Path,
    benchmark: str,
    *,
    tasks: Path | None,  # a folder of task files
    shots: int,
    chat: bool,
    limit: int | None,
    scratch: Path,
    precision: Precision = "fp32",
    device: str = "cpu",
) -> Outcome:
    """lm-eval's scores of the model in `folder`, by its names: `acc`, `acc_norm`, `exact_match_strict-match`.

    The model is computed in `precision`, whatever its weights are stored in: a base and what was made of it have to be alike.
    """
    config = None if tasks is None else local_task(tasks, benchmark)
    try:
        import evaluate  # type: ignore[import-untyped]  # has no types
        import lm_eval.utils
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(
            f"lm_eval:{benchmark}: expected the package lm-eval, got {error}; pip install 'stockpot[lm-eval]'"
        ) from error
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = lm_eval.utils.env
    sandbox = ImmutableSandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True)
    sandbox.filters.update(plain.filters)
    lm_eval.utils.env = sandbox
    load, evaluate.load = evaluate.load, partial(_refuse, benchmark)
    try:
        tasks_by_name = _load_tasks(benchmark, config, shots=shots, scratch=scratch)
        found = evaluator.evaluate(
            lm=_opened(HFLM, folder, precision=precision, device=device),
            task_dict=tasks_by_name,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except TemplateError as error:
        raise InputError(f"lm_eval:{benchmark}: {error}") from error
    finally:
        lm_eval.utils.env, evaluate.load = plain, load
    results = {**found["results"], **found.get("groups", {})}[benchmark]
    rows, scores = sum(count["effective"] for count in found["n-samples"].values()), _scores(results)
    values = _means(scores, [sample for samples in found["samples"].values() for sample in samples])
    facts = {"versions": {"lm_eval": lm_eval.__version__}, "shots": shots}
    return Outcome(scores, rows, facts=facts, values=values, replicates=_replicates(values))


def _refuse(benchmark: str, name: str, *others: Any, **options: Any) -> NoReturn:
    """In place of `evaluate.load`."""
    raise InputError(f"lm_eval:{benchmark}: expected a task that fetches no code, got one with the metric {name!r} of the Hub")


def _opened(wrapper: Any, folder: Path, *, precision: Precision, device: str) -> Any:
    """The model for lm-eval, whose batches are as large as memory holds.

    It is opened here: left to itself, lm-eval takes the dtype of the weights, and joins the group of processes that this one
    may belong to.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(precision), trust_remote_code=False)
    model, config = model.to(device).eval(), model.config
    limits = Limits(
        rows=LM_EVAL_ROWS,
        memory=memory_for_batch(torch.device(device), ALONE),
        bytes_per_token=ACTIVATION_BYTES * config.hidden_size,
    )
    rows = limits.rows_of(min(config.max_position_embeddings, LM_EVAL_LENGTH))
    tokenizer = with_bounded_template(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    return with_late_logits(wrapper)(pretrained=model, tokenizer=tokenizer, batch_size=rows)


def _load_tasks(benchmark: str, config: dict[str, Any] | None, *, shots: int, scratch: Path) -> dict[str, Any]:
    """The tasks of the benchmark as lm-eval's evaluator takes them."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    if config is None:
        is_path = "/" in benchmark or Path(benchmark).suffix in SUFFIXES  # lm-eval would run the code that it names
        manager = None if is_path else TaskManager()
        if manager is None or benchmark not in manager.all_tasks:
            raise InputError(f"lm_eval:{benchmark}: expected a task of lm-eval, got an unknown one; see `lm-eval ls tasks`")
        loaded: dict[str, Any] = manager.load([benchmark])
    else:
        check_names(config, benchmark)
        kwargs = {**config["dataset_kwargs"], "cache_dir": str(scratch / "lm-eval")}
        loaded = {"tasks": {benchmark: ConfigurableTask(config={**config, "dataset_kwargs": kwargs})}, "groups": {}}
    for task in loaded["tasks"].values():
        if shots or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _means(scores: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Of each score that is the mean of a value of the samples, these values.

    Others, such as a corpus's BLEU, are no function of single values, and have no interval.
    """
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(str(sample.get("filter", "none")), []).append(sample)
    found = {}
    for name, score in scores.items():
        for chosen, those in by_filter.items():
            metric = name if chosen == "none" else name.removesuffix(f"_{chosen}")
            values = [sample.get(metric) for sample in those]
            numbers = [float(value) for value in values if isinstance(value, int | float)]
            if len(numbers) == len(values) and math.isclose(sum(numbers) / len(numbers), score, rel_tol=1e-4, abs_tol=1e-6):
                found[name] = numbers
    return found


def _replicates(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The mean of each list of values in every resample."""
    found: dict[str, list[float]] = {}
    for name, numbers in values.items():
        array = np.array(numbers)
        found |= resample(len(array), lambda draws, name=name, array=array: {name: float(draws @ array) / len(array)})  # type: ignore[misc]  # defaults bind the loop's values
    return found


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Scores by name: `acc,none` becomes `acc`, and the name of any other filter is appended."""
    scores = {}
    for name, value in results.items():
        metric, _, chosen = name.partition(",")
        if chosen and not metric.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
            scores[metric if chosen == "none" else f"{metric}_{chosen}"] = float(f"{value:.{DIGITS}g}")
    return scores

"""Runs EleutherAI's lm-eval on a model folder: its own benchmarks, and tasks from YAML files.

A task file may come from anyone, so it is data only: tags are refused (`!function` names Python code), only fields that hold
data are accepted, data files must be in its folder, metrics and filters must be those of lm-eval, and templates are rendered
in Jinja's sandbox. The package is an extra: `pip install 'stockpot[lm-eval]'`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.errors import InputError
from llm.evaluation.bootstrap import DIGITS
from llm.evaluation.scoring import Outcome

TEXTS = {
    "task", "task_alias", "dataset_name", "training_split", "validation_split", "test_split", "fewshot_split", "doc_to_text",
    "doc_to_target", "output_type", "description", "target_delimiter", "fewshot_delimiter", "gen_prefix",
}  # fmt: skip
OTHERS = {
    "tag", "dataset_path", "dataset_kwargs", "doc_to_choice", "num_fewshot", "metric_list", "generation_kwargs", "repeats",
    "filter_list", "metadata",
}  # fmt: skip
FORMATS = ("json", "csv", "parquet", "text")  # of local data
SUFFIXES = (".yaml", ".yml")


def evaluate_folder(
    folder: Path,
    benchmark: str,
    *,
    tasks: Path | None,  # a folder of task files
    shots: int,
    chat: bool,
    limit: int | None,
    scratch: Path,
) -> Outcome:
    """lm-eval's scores of the model in `folder`, by its names: `acc`, `acc_norm`, `exact_match_strict-match`."""
    config = None if tasks is None else local_task(tasks, benchmark)
    try:
        import lm_eval.utils
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(
            f"lm_eval:{benchmark}: expected the package lm-eval, got {error}; pip install 'stockpot[lm-eval]'"
        ) from error
    import torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = lm_eval.utils.env
    sandbox = ImmutableSandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True)
    sandbox.filters.update(plain.filters)
    lm_eval.utils.env = sandbox
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tasks_by_name = _load_tasks(benchmark, config, shots=shots, scratch=scratch)
        found = evaluator.evaluate(
            lm=HFLM(pretrained=str(folder), device=device, batch_size=8),
            task_dict=tasks_by_name,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    finally:
        lm_eval.utils.env = plain
    results = {**found["results"], **found.get("groups", {})}[benchmark]
    rows = sum(count["effective"] for count in found["n-samples"].values())
    return Outcome(_scores(results), rows, facts={"versions": {"lm_eval": lm_eval.__version__}, "shots": shots})


def _load_tasks(benchmark: str, config: dict[str, Any] | None, *, shots: int, scratch: Path) -> dict[str, Any]:
    """The tasks of the benchmark as lm-eval's evaluator takes them."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    if config is None:
        try:
            loaded: dict[str, Any] = TaskManager().load([benchmark])
        except KeyError as error:
            raise InputError(
                f"lm_eval:{benchmark}: expected a task of lm-eval, got an unknown one ({error}); see `lm-eval ls tasks`"
            ) from error
    else:
        _check_names(config, benchmark)
        kwargs = {**config["dataset_kwargs"], "cache_dir": str(scratch / "lm-eval")}
        loaded = {"tasks": {benchmark: ConfigurableTask(config={**config, "dataset_kwargs": kwargs})}, "groups": {}}
    for task in loaded["tasks"].values():
        if shots or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Scores by name: `acc,none` becomes `acc`, and the name of any other filter is appended."""
    scores = {}
    for name, value in results.items():
        metric, _, chosen = name.partition(",")
        if chosen and not metric.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
            scores[metric if chosen == "none" else f"{metric}_{chosen}"] = float(f"{value:.{DIGITS}g}")
    return scores


def local_task(folder: Path, name: str) -> dict[str, Any]:
    """The task `name` of the YAML files in `folder`, with absolute paths of its data files; InputError if it is not only
    data."""
    import yaml

    configs: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise InputError(f"{path}: expected YAML without tags such as !function, which name code, got {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("task"), str):
            raise InputError(f"{path}: task: expected the name of the task, got none")
        configs[config["task"]] = (path, config)
    if name not in configs:
        raise InputError(f"{folder}: expected the task {name!r}, got only {', '.join(sorted(configs)) or 'no tasks'}")
    path, config = configs[name]
    for field, value in config.items():
        if field not in TEXTS | OTHERS:
            raise InputError(
                f"{path}: {field}: expected one of {', '.join(sorted(TEXTS | OTHERS))}, got another field; remove it"
            )
        if field in TEXTS and not isinstance(value, str | int):
            raise InputError(f"{path}: {field}: expected a string, got {value!r}")
    if config.get("dataset_path") not in FORMATS:
        raise InputError(f"{path}: dataset_path: expected one of {', '.join(FORMATS)}, got {config.get('dataset_path')!r}")
    kwargs = config.get("dataset_kwargs")
    if not isinstance(kwargs, dict) or set(kwargs) != {"data_files"}:
        raise InputError(f"{path}: dataset_kwargs: expected only data_files, got {kwargs!r}")
    return config | {"dataset_kwargs": {"data_files": _located(kwargs["data_files"], path)}}


def _located(files: Any, path: Path) -> Any:
    """Names of data files as absolute paths; InputError if one is outside the task file's folder, links resolved."""
    match files:
        case dict():
            return {str(split): _located(one, path) for split, one in files.items()}
        case list():
            return [_located(one, path) for one in files]
        case str():
            found = (path.parent / files).resolve()
            if found.is_relative_to(path.parent.resolve()) and found.is_file():
                return str(found)
    raise InputError(f"{path}: data_files: expected names of files in the folder of the task file, got {files!r}")


def _check_names(config: Mapping[str, Any], benchmark: str) -> None:
    """InputError for metrics and filters that lm-eval does not have: it would fetch such a metric from the Hub, as code."""
    import lm_eval.api.metrics
    import lm_eval.filters  # noqa: F401  # importing registers
    from lm_eval.api.registry import aggregation_registry, filter_registry, metric_registry

    metrics = config.get("metric_list", ())
    steps = [step for one in config.get("filter_list", ()) for step in one.get("filter", ())]
    wanted = [("metric", one.get("metric"), metric_registry) for one in metrics]
    wanted += [("aggregation", one["aggregation"], aggregation_registry) for one in metrics if "aggregation" in one]
    wanted += [("function", step.get("function"), filter_registry) for step in steps]
    for field, value, known in wanted:
        if not isinstance(value, str) or value not in known or value == "custom":
            raise InputError(f"lm_eval:{benchmark}: {field}: expected one of lm-eval's own, got {value!r}")
    if any(one.get("hf_evaluate") for one in metrics):
        raise InputError(f"lm_eval:{benchmark}: expected no hf_evaluate, which fetches code from the Hub, got it; remove it")

"""EleutherAI's lm-eval on a model folder: its own benchmarks, and tasks written in a YAML file.

A task file is data here, also where it comes from a stranger: it is read without tags (`!function` names Python code), only
fields that are data are taken, the data files that it names lie beside it, metrics and filters are those of lm-eval itself,
and its templates are rendered in Jinja's sandbox. The package is an extra: `pip install 'stockpot[lm-eval]'`.
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
    """The scores that lm-eval gives the model in `folder`, by its own names: `acc`, `acc_norm`, `exact_match_strict-match`."""
    config = None if tasks is None else local_task(tasks, benchmark)
    try:
        import lm_eval.utils
        from lm_eval import evaluator
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"lm_eval:{benchmark}: expected the package lm-eval: pip install 'stockpot[lm-eval]' ({error})"
        ) from error
    import torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = lm_eval.utils.env
    sandbox = ImmutableSandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True)
    sandbox.filters.update(plain.filters)
    lm_eval.utils.env = sandbox
    try:
        if config is None:
            try:
                loaded = TaskManager().load([benchmark])
            except KeyError as error:
                raise InputError(f"lm_eval:{benchmark}: lm-eval has no such task ({error})") from error
        else:
            _check_names(config, benchmark)
            kwargs = {**config["dataset_kwargs"], "cache_dir": str(scratch / "lm-eval")}
            loaded = {"tasks": {benchmark: ConfigurableTask(config={**config, "dataset_kwargs": kwargs})}, "groups": {}}
        for task in loaded["tasks"].values():
            if shots or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=1234)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = evaluator.evaluate(
            lm=HFLM(pretrained=str(folder), device=device, batch_size=8),
            task_dict=loaded,
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


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` is `acc`; of another filter, its name is added."""
    scores = {}
    for name, value in results.items():
        metric, _, chosen = name.partition(",")
        if chosen and not metric.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
            scores[metric if chosen == "none" else f"{metric}_{chosen}"] = float(f"{value:.{DIGITS}g}")
    return scores


def local_task(folder: Path, name: str) -> dict[str, Any]:
    """The task `name` of the YAML files in `folder`, its data files by absolute paths; InputError where it is not data."""
    import yaml

    configs: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise InputError(f"{path}: is not plain YAML, without tags such as !function, which name code: {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("task"), str):
            raise InputError(f"{path}: expected a table with the name of a task in 'task', got none")
        configs[config["task"]] = (path, config)
    if name not in configs:
        raise InputError(f"{folder}: has no task {name!r}; its files name {', '.join(sorted(configs)) or 'none'}")
    path, config = configs[name]
    for field, value in config.items():
        if field not in TEXTS | OTHERS:
            raise InputError(f"{path}: {field} is not taken from a task file; these are: {', '.join(sorted(TEXTS | OTHERS))}")
        if field in TEXTS and not isinstance(value, str | int):
            raise InputError(f"{path}: {field}: expected a text, got {value!r}")
    if config.get("dataset_path") not in FORMATS:
        raise InputError(f"{path}: dataset_path: expected one of {', '.join(FORMATS)}, got {config.get('dataset_path')!r}")
    kwargs = config.get("dataset_kwargs")
    if not isinstance(kwargs, dict) or set(kwargs) != {"data_files"}:
        raise InputError(f"{path}: dataset_kwargs: expected data_files and nothing else, got {kwargs!r}")
    return config | {"dataset_kwargs": {"data_files": _located(kwargs["data_files"], path)}}


def _located(files: Any, path: Path) -> Any:
    """Names of data files as absolute paths below the folder of the task file, wherever links lead."""
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
    """Metrics and filters are looked up in lm-eval; a metric that it does not have would be fetched from the Hub, as code."""
    import lm_eval.api.metrics
    import lm_eval.filters  # noqa: F401  # importing registers
    from lm_eval.api.registry import aggregation_registry, filter_registry, metric_registry

    wanted = [("metric", one.get("metric"), metric_registry) for one in config.get("metric_list", ())]
    wanted += [
        ("aggregation", one["aggregation"], aggregation_registry)
        for one in config.get("metric_list", ())
        if "aggregation" in one
    ]
    wanted += [
        ("function", step.get("function"), filter_registry)
        for one in config.get("filter_list", ())
        for step in one.get("filter", ())
    ]
    for field, value, known in wanted:
        if not isinstance(value, str) or value not in known or value == "custom":
            raise InputError(f"lm_eval:{benchmark}: {field}: expected one that lm-eval has, got {value!r}")
    for one in config.get("metric_list", ()):
        if one.get("hf_evaluate"):
            raise InputError(f"lm_eval:{benchmark}: hf_evaluate fetches code from the Hub, so it is refused")

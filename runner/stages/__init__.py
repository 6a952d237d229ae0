"""One file per kind of stage; adding a file adds a kind."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

import runner.stages
from runner.stage import Stage


@cache
def stage_kinds() -> Mapping[str, type[Stage]]:
    """Every kind of stage: importing a module of `runner.stages` registers its kinds."""
    for module in pkgutil.iter_modules(runner.stages.__path__):
        importlib.import_module(f"{runner.stages.__name__}.{module.name}")
    return Stage.registry

"""The kinds of stages: each module here registers its kind. What kinds share is in the package `fields`."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from runner.stage import Stage


@cache
def stage_kinds() -> Mapping[str, type[Stage]]:
    """Every kind of stage by its name; the modules of this package are imported, which registers them."""
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            importlib.import_module(f"{__name__}.{module.name}")
    return Stage.registry

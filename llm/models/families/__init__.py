"""The registry of families: every file in here that defines a subclass of `Family` is one. No torch here.

A family says which options its models have, how they stand in Transformers' config.json, and how llama.cpp calls them. Adding
a file adds a family; nothing else lists them.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from llm.models.families.family import Alias, Family


@cache
def families() -> Mapping[str, Family]:
    """Every family by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = {family.name: family() for family in Family.__subclasses__()}
    return dict(sorted(found.items()))


def family_of(model_type: object) -> tuple[Family, Alias] | None:
    """The family that computes models of Transformers' `model_type`, and how it is written there; None if there is none."""
    for family in families().values():
        if model_type == family.name:
            return family, Alias()
        if isinstance(model_type, str) and model_type in family.aliases:
            return family, family.aliases[model_type]
    return None

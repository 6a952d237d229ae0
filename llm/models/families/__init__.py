"""The registry of families: every class in a file here that derives from `Family` and has a `name` is one. No torch here.

A family says which options its models have, how they stand in Transformers' config.json, and how llama.cpp calls them. Adding
a file adds a family; nothing else lists them.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache

from llm.models.families.family import Alias, Family


@cache
def families() -> Mapping[str, Family]:
    """Every family by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = {family.name: family() for family in _below(Family) if "name" in vars(family)}
    return dict(sorted(found.items()))


def _below(family: type[Family]) -> Iterator[type[Family]]:
    for found in family.__subclasses__():
        yield found
        yield from _below(found)


def family_of(model_type: object) -> tuple[Family, Alias] | None:
    """The family that computes models of Transformers' `model_type`, and how it is written there; None if there is none."""
    for family in families().values():
        if model_type == family.name:
            return family, Alias()
        if isinstance(model_type, str) and model_type in family.aliases:
            return family, family.aliases[model_type]
    return None

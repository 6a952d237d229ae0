"""How a model's answers are drawn if nobody says otherwise: the sampling fields of its `generation_config.json`.

They are its publisher's, and stay with a model that is adapted; one that is trained from nothing answers greedily.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from llm.errors import InputError
from llm.files import read_json

FILE = "generation_config.json"
# Field -> smallest and largest value.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
}
# What stock Transformers does where it samples and a field is missing.
TRANSFORMERS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}

Sampling = Mapping[str, bool | int | float]  # fields of RANGES, and do_sample


def read_sampling(folder: Path) -> dict[str, bool | int | float]:
    """The sampling fields of a model folder: `do_sample`, and those of RANGES that are set; InputError if one is no such
    number.

    Of a model that answers greedily only the repetition penalty matters.
    """
    path = folder / FILE
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a table, got {found!r:.80}")
    sampling: dict[str, bool | int | float] = {"do_sample": bool(found.get("do_sample"))}
    for field, (low, high) in RANGES.items():
        value = found.get(field)
        if value is None or not (sampling["do_sample"] or field == "repetition_penalty"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise InputError(f"{path}: {field}: expected a number from {low:g} to {high:g}, got {value!r:.80}")
        sampling[field] = value
    return sampling


def as_sampled(sampling: Sampling) -> dict[str, int | float]:
    """Every number that decides how a token is drawn, as stock Transformers draws it: temperature 0 is greedy."""
    numbers = {field: value for field, value in sampling.items() if field != "do_sample"}
    if not sampling.get("do_sample"):
        return {"temperature": 0.0} | numbers
    return TRANSFORMERS | numbers

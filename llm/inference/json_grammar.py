"""Answers that are JSON, or JSON of a schema: which tokens may come next, by the library llguidance.

It is optional (`pip install 'stockpot[json]'`): Rust, with no dependencies of its own, and works with any `tokenizer.json`.

Letters: V vocabulary.
"""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llm.errors import InputError
from llm.inference.sampling import Constraint
from llm.tokenizer.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

# Spaces are fixed, as Python writes JSON: where they are free, a small model may write them until its limit.
OPTIONS: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
DEEPEST = 100  # levels of tables and lists
LARGEST_PATTERN = 20_000  # parts: the library would take seconds, and gigabytes for repeats within repeats
_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


def schema_fault(schema: Mapping[str, Any]) -> str | None:
    """Why a schema asks for too much; None if it does not. The library bounds the rest."""
    waiting: list[tuple[Any, int]] = [(schema, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            return f"expected at most {DEEPEST} levels, got more"
        if isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        elif isinstance(value, dict):
            waiting += [(item, depth + 1) for item in value.values()]
            named = value.get("patternProperties")
            patterns = [value.get("pattern"), *(named if isinstance(named, dict) else ())]
            if large := [pattern for pattern in patterns if isinstance(pattern, str) and _weight(pattern) > LARGEST_PATTERN]:
                return f"expected a pattern of at most {LARGEST_PATTERN:,} parts, got {large[0]!r:.80}"
    return None


def _weight(pattern: str) -> int:
    """The parts of a regular expression, where those that are repeated {n} times count n times."""
    groups = [[0, 0]]  # the parts of each open group, and of the last part of it
    for found in _PARTS.finditer(pattern):
        group = groups[-1]
        if found[0] == "(":
            groups.append([0, 0])
        elif found[0] == ")" and len(groups) > 1:
            inside = groups.pop()[0]
            groups[-1] = [groups[-1][0] + inside, inside]
        elif found[1]:
            count = int((found[2] or found[1])[:9])
            group[:] = [group[0] + group[1] * (count - 1), group[1] * count]
        else:
            group[:] = [group[0] + 1, 1]
    return sum(parts for parts, _ in groups)


class JsonGrammars:
    """Makes constraints for one tokenizer; InputError without the library."""

    def __init__(self, tokenizer: TextTokenizer, *, vocab_size: int) -> None:
        """`vocab_size` is the model's, which may be padded."""
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise InputError("JSON by grammar: expected the package llguidance; `pip install 'stockpot[json]'`") from error
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(tokenizer.ends))

    def constraint(self, schema: Mapping[str, Any]) -> Constraint:
        """For one answer: JSON that fits `schema`. InputError for a schema that the library does not know."""
        from llguidance import LLMatcher

        if fault := schema_fault(schema):
            raise InputError(f"schema: {fault}")
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=OPTIONS)
        except ValueError as error:
            raise InputError(f"schema: {error}") from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"schema: {_first_line(matcher.get_error())}")
        return JsonConstraint(matcher, self._vocab_size)


class JsonConstraint:
    """The state of one answer within its grammar."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Tensor:
        """Which tokens may come next, (V,)."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_))

    def accept(self, token: int) -> None:
        """Go on after `token`."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"JSON by grammar: {_first_line(self._matcher.get_error())}")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "unknown error"

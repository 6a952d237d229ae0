"""Gates: what a recipe demands of scores, and the verdicts on them.

    gates = [{ score = "section.macro_f1", at_least = 0.90 }, { score = "general.bits_per_byte", at_most = 1.5 }]

A gate is judged from the scores in an evaluation's record on every run, whether or not they were computed before, and is no
part of any key. What a failed gate means for the run (exit code, what is blocked) is decided by who asks for the verdicts.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import model_validator

from runner.errors import RecipeError
from runner.stage import Execution, Spec


class Gate(Spec):
    """One demand on one score; exactly one bound."""

    score: Execution[str]
    """The score, as `task.metric`."""
    at_least: Execution[float | None] = None
    """Passes from this value up."""
    at_most: Execution[float | None] = None
    """Passes from this value down."""

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        bounds = [name for name in ("at_least", "at_most") if getattr(self, name) is not None]
        if len(bounds) != 1:
            raise ValueError(f"wants exactly one of at_least and at_most, found {' and '.join(bounds) or 'neither'}")
        return self


@dataclass(frozen=True)
class Verdict:
    """What came of one gate."""

    score: str
    value: float
    wanted: str  # "at least 0.9"
    passed: bool

    def __str__(self) -> str:
        return f"{self.score} = {_number(self.value)}, wanted {self.wanted}: {'passed' if self.passed else 'failed'}"


def judge(gates: Iterable[Gate], scores: Mapping[str, float]) -> list[Verdict]:
    """The verdict on each gate, in their order; a RecipeError if a gate names a score that is not there."""
    return [_judge(gate, scores) for gate in gates]


def unknown_score(name: str, known: Sequence[str]) -> str:
    """The sentence for a gate whose score nobody makes."""
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"there are {', '.join(sorted(known))}"
    return f"a gate names the score {name!r}, which this evaluation does not make; {hint}"


def _judge(gate: Gate, scores: Mapping[str, float]) -> Verdict:
    if gate.score not in scores:
        raise RecipeError(unknown_score(gate.score, list(scores)))
    value = scores[gate.score]
    if gate.at_least is not None:
        return Verdict(gate.score, value, f"at least {_number(gate.at_least)}", value >= gate.at_least)
    assert gate.at_most is not None  # Gate has exactly one bound
    return Verdict(gate.score, value, f"at most {_number(gate.at_most)}", value <= gate.at_most)


def _number(value: float) -> str:
    """Short, but never so short that a failed score looks like its bound."""
    return f"{value:.6g}"

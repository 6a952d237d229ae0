"""Gates: what a recipe demands of scores, and the verdicts on them.

    gates = [
      { score = "section.macro_f1", at_least = 0.90, confidence = 0.95 },
      { score = "general.bits_per_byte", at_most = 0.05, above = "before" },
    ]

A gate is judged from the scores in an evaluation's record on every run, whether or not they were computed before, and is no
part of any key. What a failed gate means for the run (exit code, what is blocked) is decided by who asks for the verdicts.

An interval is between percentiles of what resamples of the examples score (Efron 1979). All evaluations of the same examples
resample them alike (`llm.evaluation.bootstrap`), so the differences of two, resample by resample, are those of a paired bootstrap.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Self

from pydantic import Field, model_validator

from runner.artifacts import Scores
from runner.errors import RecipeError
from runner.graph import ancestors
from runner.stage import Execution, Lineage, Metrics, Ref, Spec

TRAIN_GAP = "train_gap"  # held-out loss minus training loss of the last training behind the evaluated model
SHOWN = 0.95  # confidence of the interval that is told where a gate asks for none


class Gate(Spec):
    """One demand on one score; exactly one bound."""

    score: Execution[str]
    """The score, as `task.metric`; or `train_gap`, how much the loss on held-out rows is above that on rows just learned."""
    at_least: Execution[float | None] = None
    """Passes from this value up."""
    at_most: Execution[float | None] = None
    """Passes from this value down."""
    above: Execution[Ref[Scores] | None] = None
    """Another evaluation of the same rows: the bound is for how much the score is above the one there."""
    confidence: Execution[Annotated[float, Field(gt=0, lt=1)] | None] = None
    """Asks for significance: the bound has to hold for the whole interval with this confidence, as 0.95, not only for the
    score itself. The interval is a bootstrap over the examples, paired where there is `above`."""

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        bounds = [name for name in ("at_least", "at_most") if getattr(self, name) is not None]
        if len(bounds) != 1:
            raise ValueError(f"expected exactly one of at_least and at_most, got {' and '.join(bounds) or 'neither'}")
        for name in ("above", "confidence"):
            if self.score == TRAIN_GAP and getattr(self, name) is not None:
                raise ValueError(f"{name} is for scores of examples; {TRAIN_GAP!r} has none")
        return self

    @property
    def wanted(self) -> str:
        """`at least 0.9`."""
        bound = f"at least {_number(self.at_least)}" if self.at_least is not None else f"at most {_number(self.at_most)}"
        above = f" above {self.above}" if self.above is not None else ""
        return bound + above + (f" with {self.confidence * 100:g}% confidence" if self.confidence is not None else "")

    def holds(self, low: float, high: float) -> bool:
        """Whether the bound holds from `low` to `high`."""
        return low >= self.at_least if self.at_least is not None else self.at_most is not None and high <= self.at_most


@dataclass(frozen=True)
class Measured:
    """What an evaluation found, as its record has it."""

    scores: Mapping[str, float]
    replicates: Mapping[str, str] = field(default_factory=dict)  # by score, what the resamples score: numbers between spaces
    examples: Mapping[str, str] = field(default_factory=dict)  # by task, the digest of its examples

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        """From the metrics of an `evaluate` stage."""
        examples = {task: facts["examples"] for task, facts in metrics.get("tasks", {}).items() if "examples" in facts}
        return cls(metrics["scores"], metrics.get("replicates", {}), examples)

    def resampled(self, score: str) -> list[float]:
        """What the resamples score; nothing where no examples were kept."""
        return [float(number) for number in self.replicates.get(score, "").split()]


@dataclass(frozen=True)
class Verdict:
    """What came of one gate."""

    score: str
    wanted: str  # "at least 0.9"
    value: float | None = None
    interval: tuple[float, float] | None = None  # of the value; of the difference where there is one
    difference: tuple[float, str] | None = None  # from the value of which evaluation
    passed: bool | None = False
    because: str = ""  # where it is not for the value that it failed

    @property
    def gate(self) -> str:
        """What was asked."""
        return f"{self.score} {self.wanted}"

    @property
    def found(self) -> str:
        """The value with its interval."""
        if self.value is None:
            return "unknown"
        interval = f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else ""
        if self.difference is None:
            return _number(self.value) + interval
        return f"{_number(self.value)}, {_number(self.difference[0])}{interval} above {self.difference[1]}"

    @property
    def outcome(self) -> str:
        """Passed or failed, in words."""
        word = {True: "passed", False: "failed", None: "not judged yet"}[self.passed]
        return f"{word}, {self.because}" if self.because else word

    def __str__(self) -> str:
        return f"{self.score} = {self.found}, wanted {self.wanted}: {self.outcome}"


def judge(gates: Iterable[Gate], found: Measured, others: Mapping[str, Measured] | None = None) -> list[Verdict]:
    """The verdict on each gate, in their order; `others` are the evaluations that `above` names, as far as they are finished.

    RecipeError if a gate names a score that is not there.
    """
    return [_judge(gate, found, others or {}) for gate in gates]


def unknown_score(name: str, known: Sequence[str]) -> str:
    """The sentence for a gate whose score nobody makes."""
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"there are {', '.join(sorted(known))}"
    return f"a gate names the score {name!r}, which this evaluation does not make; {hint}"


def interval(resampled: Sequence[float], confidence: float) -> tuple[float, float]:
    """Between which two percentiles of the resamples that share of them lies, as much left out below as above."""
    ordered = sorted(resampled)
    low, high = (_quantile(ordered, (1 - sign * confidence) / 2) for sign in (1, -1))
    return low, high


def _quantile(ordered: Sequence[float], share: float) -> float:
    """With a straight line between neighbours, as numpy's default."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _judge(gate: Gate, found: Measured, others: Mapping[str, Measured]) -> Verdict:
    if gate.score not in found.scores:
        if gate.score == TRAIN_GAP:
            return Verdict(gate.score, gate.wanted, because="since no training behind the model told a loss on held-out rows")
        raise RecipeError(unknown_score(gate.score, list(found.scores)))
    value, resampled = found.scores[gate.score], found.resampled(gate.score)
    compared, difference = value, None
    if gate.above is not None:
        other, task = others.get(gate.above), gate.score.partition(".")[0]
        if other is None:
            return Verdict(gate.score, gate.wanted, value, passed=None)
        if gate.score not in other.scores or found.examples.get(task) != other.examples.get(task):
            return Verdict(gate.score, gate.wanted, value, because=f"since {gate.above} scored other rows")
        compared = value - other.scores[gate.score]
        difference = (compared, str(gate.above))
        base = other.resampled(gate.score)
        resampled = [one - two for one, two in zip(resampled, base, strict=True)] if len(base) == len(resampled) else []
    ends = interval(resampled, gate.confidence or SHOWN) if resampled else None
    if gate.confidence is not None and ends is None:
        return Verdict(gate.score, gate.wanted, value, difference=difference, because="since its examples were not kept")
    passed = gate.holds(compared, compared) and (gate.confidence is None or ends is None or gate.holds(*ends))
    return Verdict(gate.score, gate.wanted, value, ends, difference, passed)


def _number(value: float | None) -> str:
    """Short, but never so short that a failed score looks like its bound."""
    return f"{value:.6g}"


def last_trainings(model: str, inputs: Mapping[str, Sequence[str]], trains: Callable[[str], bool]) -> list[str]:
    """The trainings behind a model (or the model's own) on whose result no other of them builds."""
    found = [name for name in (model, *ancestors(inputs, model)) if trains(name)]
    earlier = {source for name in found for source in ancestors(inputs, name)}
    return sorted({*found} - earlier)


def train_gap(model: str, lineage: Lineage) -> dict[str, float]:
    """By how much the loss on held-out rows is above the one in the last steps of training; the largest of several trainings,
    and nothing where none tells both.
    """

    def told(name: str) -> Metrics:
        metrics: Metrics = lineage.records[name]["metrics"] if name in lineage.records else {}
        return metrics

    trainings = last_trainings(model, lineage.inputs, lambda name: "trained_parameters" in told(name))
    gaps = [
        told(name)["validation_loss"] - told(name)["loss"]
        for name in trainings
        if told(name).get("validation_loss") is not None and told(name).get("loss") is not None
    ]
    return {TRAIN_GAP: max(gaps)} if gaps else {}

"""Gates: the bounds that a recipe sets for scores, and the verdicts on them.

    gates = [
      { score = "section.macro_f1", at_least = 0.90, confidence = 0.95 },
      { score = "general.bits_per_byte", at_most = 0.05, above = "before" },
    ]

A gate is judged from the scores in an evaluation's record on every run, also for cached results, and is not part of any key.
What a failed gate means for the run (exit code, blocked stages) is decided by the caller.

An interval lies between percentiles of the scores of resamples of the examples (Efron 1979). All evaluations of the same
examples draw the same resamples (`llm.evaluation.bootstrap`), so their differences, resample by resample, are a paired
bootstrap.
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

TRAIN_GAP = "train_gap"  # held-out loss minus training loss of the last training before the evaluated model
DEFAULT_CONFIDENCE = 0.95  # of intervals that are shown where a gate asks for none


class Gate(Spec):
    """A bound for one score: exactly one of `at_least` and `at_most`."""

    score: Execution[str]
    """The score, as `task.metric`; or `train_gap`, the loss on held-out rows minus the loss in the last steps of training."""
    at_least: Execution[float | None] = None
    """Passes if the score is at least this."""
    at_most: Execution[float | None] = None
    """Passes if the score is at most this."""
    above: Execution[Ref[Scores] | None] = None
    """Another evaluation of the same rows: the bound is for the score minus the score there."""
    confidence: Execution[Annotated[float, Field(gt=0, lt=1)] | None] = None
    """Requires significance: the bound has to hold for the whole interval with this confidence, such as 0.95, not only for the
    score itself. The interval is a bootstrap over the examples, paired with `above`."""

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        bounds = [name for name in ("at_least", "at_most") if getattr(self, name) is not None]
        if len(bounds) != 1:
            raise ValueError(f"expected exactly one of at_least and at_most, got {' and '.join(bounds) or 'neither'}")
        for name in ("above", "confidence"):
            if self.score == TRAIN_GAP and getattr(self, name) is not None:
                raise ValueError(f"{name}: expected no value, since {TRAIN_GAP!r} is not a score of examples, got one")
        return self

    @property
    def bound(self) -> str:
        """As text: `at least 0.9`."""
        limit = f"at least {_number(self.at_least)}" if self.at_least is not None else f"at most {_number(self.at_most)}"
        above = f" above {self.above}" if self.above is not None else ""
        return limit + above + (f" with {self.confidence * 100:g}% confidence" if self.confidence is not None else "")

    def holds(self, low: float, high: float) -> bool:
        """Whether the bound holds for all values from `low` to `high`."""
        return low >= self.at_least if self.at_least is not None else self.at_most is not None and high <= self.at_most


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation, from its record."""

    scores: Mapping[str, float]
    replicates: Mapping[str, str] = field(default_factory=dict)  # by score, that of each resample: numbers between spaces
    examples: Mapping[str, str] = field(default_factory=dict)  # by task, the digest of its examples
    precisions: Mapping[str, str] = field(default_factory=dict)  # by task, that of the products of the model

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        """From the metrics of an `evaluate` stage."""
        examples, precisions = (
            {task: facts[fact] for task, facts in metrics.get("tasks", {}).items() if fact in facts}
            for fact in ("examples", "precision")
        )
        return cls(metrics["scores"], metrics.get("replicates", {}), examples, precisions)

    def resampled(self, score: str) -> list[float]:
        """The score of each resample; empty if no examples were kept."""
        return [float(number) for number in self.replicates.get(score, "").split()]


@dataclass(frozen=True)
class GateVerdict:
    """The result of one gate."""

    score: str
    bound: str  # "at least 0.9"
    value: float | None = None
    interval: tuple[float, float] | None = None  # of the value; of the difference where there is one
    difference: tuple[float, str] | None = None  # from the score of another evaluation, and its name
    passed: bool | None = False
    because: str = ""  # why it failed, if not for the value

    @property
    def gate(self) -> str:
        """The condition."""
        return f"{self.score} {self.bound}"

    @property
    def found(self) -> str:
        """The value with its interval."""
        if self.value is None:
            return "unknown"
        interval = f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else ""
        if self.difference is None:
            return _number(self.value) + interval
        return f"{_number(self.value)}, {_number(self.difference[0])}{interval} above {self.difference[1]}"

    def __str__(self) -> str:
        word = {True: "passed", False: "failed", None: "not judged yet"}[self.passed]
        return f"{self.score} = {self.found}, wanted {self.bound}: {word}" + (f", {self.because}" if self.because else "")


def judge(
    gates: Iterable[Gate], found: EvaluationResult, others: Mapping[str, EvaluationResult] | None = None
) -> list[GateVerdict]:
    """The verdict on each gate, in order; `others` are the finished evaluations that `above` names.

    RecipeError if a gate names a score that does not exist.
    """
    return [_judge(gate, found, others or {}) for gate in gates]


def unknown_score(name: str, known: Sequence[str]) -> str:
    """The message for a gate whose score the evaluation does not have."""
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"there are {', '.join(sorted(known))}"
    return f"score of a gate: expected one of this evaluation, got {name!r}; {hint}"


def interval(resampled: Sequence[float], confidence: float) -> tuple[float, float]:
    """The two percentiles between which the middle share `confidence` of the resamples lies."""
    ordered = sorted(resampled)
    low, high = (_quantile(ordered, (1 - sign * confidence) / 2) for sign in (1, -1))
    return low, high


def _quantile(ordered: Sequence[float], share: float) -> float:
    """With linear interpolation, numpy's default."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _judge(gate: Gate, found: EvaluationResult, others: Mapping[str, EvaluationResult]) -> GateVerdict:
    if gate.score not in found.scores:
        if gate.score == TRAIN_GAP:
            return GateVerdict(
                gate.score, gate.bound, because="since no training of the model measured a loss on held-out rows"
            )
        raise RecipeError(unknown_score(gate.score, list(found.scores)))
    value, resampled = found.scores[gate.score], found.resampled(gate.score)
    compared, difference = value, None
    if gate.above is not None:
        other, task = others.get(gate.above), gate.score.partition(".")[0]
        if other is None:
            return GateVerdict(gate.score, gate.bound, value, passed=None)
        if gate.score not in other.scores or found.examples.get(task) != other.examples.get(task):
            return GateVerdict(gate.score, gate.bound, value, because=f"since {gate.above} scored other rows")
        here, there = found.precisions.get(task), other.precisions.get(task)
        if None not in (here, there) and here != there:  # a score without a model has no precision
            because = f"since it was scored in {here}, and {gate.above} in {there}; run one of them again with --force"
            return GateVerdict(gate.score, gate.bound, value, because=because)
        compared = value - other.scores[gate.score]
        difference = (compared, str(gate.above))
        base = other.resampled(gate.score)
        resampled = [one - two for one, two in zip(resampled, base, strict=True)] if len(base) == len(resampled) else []
    ends = interval(resampled, gate.confidence or DEFAULT_CONFIDENCE) if resampled else None
    if gate.confidence is not None and ends is None:
        return GateVerdict(gate.score, gate.bound, value, difference=difference, because="since its examples were not kept")
    passed = gate.holds(compared, compared) and (gate.confidence is None or ends is None or gate.holds(*ends))
    return GateVerdict(gate.score, gate.bound, value, ends, difference, passed)


def _number(value: float | None) -> str:
    """With enough digits that a failed score does not look equal to its bound."""
    return f"{value:.6g}"


def last_trainings(model: str, inputs: Mapping[str, Sequence[str]], trains: Callable[[str], bool]) -> list[str]:
    """The trainings that made a model, without those that another of them continues from."""
    found = [name for name in (model, *ancestors(inputs, model)) if trains(name)]
    earlier = {source for name in found for source in ancestors(inputs, name)}
    return sorted({*found} - earlier)


def train_gap(model: str, lineage: Lineage) -> dict[str, float]:
    """The loss on held-out rows minus the loss in the last steps of training, as a score; the largest of several trainings,
    and empty if none has both losses.
    """

    def metrics(name: str) -> Metrics:
        return dict(lineage.records[name]["metrics"]) if name in lineage.records else {}

    trainings = [
        metrics(name) for name in last_trainings(model, lineage.inputs, lambda name: "trained_parameters" in metrics(name))
    ]
    gaps = [
        training["validation_loss"] - training["loss"]
        for training in trainings
        if training.get("validation_loss") is not None and training.get("loss") is not None
    ]
    return {TRAIN_GAP: max(gaps)} if gaps else {}

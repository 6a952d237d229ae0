"""Two runs side by side: fields that differ, scores with intervals of their difference, and costs; from records alone.

The difference of a score has the interval of a paired bootstrap where both scored the same rows (`runner.gates`): every
evaluation of N rows draws the same resamples. Where they scored other rows, the resamples are independent draws.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.gates import DEFAULT_CONFIDENCE, EvaluationResult, interval

Records = Mapping[str, Mapping[str, Any]]  # by stage
COSTS = ("seconds", "tokens", "flops", "peak_memory_bytes")
LOSSES = ("loss", "validation_loss", "validation_bits_per_byte")  # of trainings, compared beside scores
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "bits_per_byte_change", "ece", "loss")  # ends of names
WITHOUT_ORDER = ("length_ratio", "length_change", "repetition", "repetition_change")  # better nearer to the expected answers


@dataclass(frozen=True)
class Difference:
    """A score of both; None where one lacks it."""

    name: str  # stage: task.metric
    a: float | None
    b: float | None
    interval: tuple[float, float] | None = None  # of b - a
    rows: str = ""  # "same", "other", or "" where none are known

    @property
    def change(self) -> float | None:
        """How much larger it is in B."""
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def verdict(self) -> str:
        """Whether B is better, as far as the interval tells."""
        if self.change is None or self.interval is None or self.name.endswith(WITHOUT_ORDER):
            return ""
        low, high = self.interval
        if low <= 0 <= high:
            return "not clear"
        return "better" if (high < 0) == self.name.endswith(LOWER_IS_BETTER) else "worse"


def differences(a: Records, b: Records) -> Iterator[Difference]:
    """Each score and loss of two runs."""
    for name, one, other in _pairs(a, b):
        if "scores" in one or "scores" in other:
            yield from _scores(name, one, other)
        else:
            for loss in LOSSES:
                before, after = (metrics.get(loss) if "trained_parameters" in metrics else None for metrics in (one, other))
                if before is not None or after is not None:
                    yield Difference(f"{name}: {loss}", before, after)


def _pairs(a: Records, b: Records) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """The metrics of each stage in both, by its name; evaluations that are the only ones without a partner are paired."""
    found = {name: (a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b])}
    alone = [[name for name, pair in found.items() if pair[1 - side] is None and _is_scored(pair[side])] for side in (0, 1)]
    if [len(names) for names in alone] == [1, 1]:
        (one,), (other,) = alone
        found[one if one == other else f"{one} / {other}"] = (found.pop(one)[0], found.pop(other)[1])
    for name, pair in found.items():
        one_metrics, other_metrics = ({} if record is None else record["metrics"] for record in pair)
        yield name, one_metrics, other_metrics


def _is_scored(record: Mapping[str, Any] | None) -> bool:
    return record is not None and "scores" in record["metrics"]


def _scores(stage: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    a, b = (EvaluationResult.of({"scores": {}, **metrics}) for metrics in (one, other))
    for score in dict.fromkeys([*a.scores, *b.scores]):
        task, name = score.partition(".")[0], f"{stage}: {score}"
        first, second = a.resampled(score), b.resampled(score)
        if not first or len(first) != len(second):
            yield Difference(name, a.scores.get(score), b.scores.get(score))
            continue
        same = a.examples.get(task) is not None and a.examples.get(task) == b.examples.get(task)
        # The draws of two evaluations of as many rows are the same: in another order they are independent.
        second = second if same else second[::-1]
        ends = interval([later - before for before, later in zip(first, second, strict=True)], DEFAULT_CONFIDENCE)
        yield Difference(name, a.scores[score], b.scores[score], ends, "same" if same else "other")


def costs(a: Records, b: Records) -> list[dict[str, Any]]:
    """What each stage cost in both, and all of them together; a stage whose result they share says so."""
    found = []
    for stage in dict.fromkeys([*a, *b]):
        one, other = a.get(stage), b.get(stage)
        shared = one is not None and other is not None and one["key"] == other["key"]
        found.append({"stage": stage, "shared": shared, "a": _cost(one), "b": _cost(other)})
    sums = ({"seconds": sum(record["seconds"] for record in run.values())} for run in (a, b))
    return [*found, {"stage": "all", "shared": False, **dict(zip("ab", sums, strict=True))}]


def _cost(record: Mapping[str, Any] | None) -> dict[str, float]:
    if record is None:
        return {}
    facts = {**record["metrics"], "seconds": record["seconds"]}
    return {name: facts[name] for name in COSTS if isinstance(facts.get(name), int | float)}

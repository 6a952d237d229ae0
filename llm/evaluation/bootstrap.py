"""Bootstrap resamples: how much a score depends on which examples were scored (Efron 1979).

A resample draws as many examples as there are, with replacement, and is represented by how often each was drawn. The draws
depend only on the number of examples, so two models scored on the same examples can be compared resample by resample, as in a
paired bootstrap. Intervals and gates are computed elsewhere.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000  # the ends of a 95% interval are then the 25th value from either side
SEED = 0
DIGITS = 6  # of a score; the order in which cores add numbers shows from the 9th on

Resamples = npt.NDArray[np.float64]  # (N,) how often each example was drawn


def resamples(examples: int) -> Iterator[Resamples]:
    """How often each of N examples is drawn, for every resample; the same for the same N on every machine."""
    # RandomState: its stream is frozen (NEP 19); that of the newer Generator is not.
    random = np.random.RandomState(SEED)
    for _ in range(RESAMPLES):
        yield np.bincount(random.randint(examples, size=examples), minlength=examples).astype(np.float64)


def resample(examples: int, score: Callable[[Resamples], Mapping[str, float]]) -> dict[str, list[float]]:
    """The value of each score in every resample; `score` maps how often each example was drawn to scores by name."""
    values: dict[str, list[float]] = {}
    for draws in resamples(examples):
        for name, value in score(draws).items():
            values.setdefault(name, []).append(value)
    return {name: round_all(numbers) for name, numbers in values.items()}


def macro_f1(expected: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64], labels: int) -> Callable[[Resamples], float]:
    """Macro-F1 as a function of how often each row was drawn, from each row's expected and chosen label (indices).

    A label that occurs in the rows but not in a resample is left out of that resample, because its F1 is undefined there. A
    label that occurs in no row counts 0, as in the score itself.
    """
    hit = expected == chosen
    absent = labels - len(np.union1d(expected, chosen))

    def score(draws: Resamples) -> float:
        hits = np.bincount(expected[hit], weights=draws[hit], minlength=labels)
        either = np.bincount(expected, weights=draws, minlength=labels) + np.bincount(chosen, weights=draws, minlength=labels)
        seen = either > 0
        return float((2 * hits[seen] / either[seen]).sum() / (seen.sum() + absent))

    return score


def fingerprint(examples: Iterable[str]) -> str:
    """A digest of the examples in their order, to check that two evaluations used the same ones."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(hashlib.sha256(example.encode()).digest())
    return digest.hexdigest()


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores rounded to DIGITS significant digits."""
    return dict(zip(scores, round_all(scores.values()), strict=True))


def round_all(values: Iterable[float]) -> list[float]:
    """Numbers rounded to DIGITS significant digits."""
    return [float(f"{value:.{DIGITS}g}") for value in values]

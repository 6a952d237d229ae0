"""How much scores depend on which examples happened to be there: what resamples of the examples would score (Efron 1979).

A resample draws as many examples as there are, with replacement, and is told as how often each was drawn. The draws depend on
the number of examples alone, so that two models scored on the same examples are compared resample by resample: the
differences are those of a paired bootstrap. What becomes of the numbers (intervals, gates) is not known here.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000  # the ends of a 95% interval are then the 25th value from either side
SEED = 0
DIGITS = 6  # of a score; in which order cores add numbers shows from the 9th on

Resamples = npt.NDArray[np.float64]  # (N,) how often each example was drawn


def resamples(examples: int) -> Iterator[Resamples]:
    """How often each of N examples is drawn, for every resample; the same for the same N on every machine."""
    # RandomState, because its stream is frozen for good (NEP 19), and that of the newer Generator is not.
    random = np.random.RandomState(SEED)
    for _ in range(RESAMPLES):
        yield np.bincount(random.randint(examples, size=examples), minlength=examples).astype(np.float64)


def resample(examples: int, score: Callable[[Resamples], Mapping[str, float]]) -> dict[str, list[float]]:
    """For each score, its value in every resample; `score` maps how often each example counts to scores by name."""
    values: dict[str, list[float]] = {}
    for draws in resamples(examples):
        for name, value in score(draws).items():
            values.setdefault(name, []).append(value)
    return {name: round_all(of_one) for name, of_one in values.items()}


def macro_f1(wanted: npt.NDArray[np.int64], found: npt.NDArray[np.int64], labels: int) -> Callable[[Resamples], float]:
    """Macro-F1 as a function of how often each row counts, from the number of the label that was wanted and found in each.

    A label of the rows that a resample has no trace of is left out there: nothing says how well it would be found. One that
    no row has at all counts 0, as in the score itself.
    """
    hit = wanted == found
    absent = labels - len(np.union1d(wanted, found))

    def score(draws: Resamples) -> float:
        hits = np.bincount(wanted[hit], weights=draws[hit], minlength=labels)
        either = np.bincount(wanted, weights=draws, minlength=labels) + np.bincount(found, weights=draws, minlength=labels)
        seen = either > 0
        return float((2 * hits[seen] / either[seen]).sum() / (seen.sum() + absent))

    return score


def fingerprint(examples: Iterable[str]) -> str:
    """What tells whether two evaluations had the same examples in the same order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(hashlib.sha256(example.encode()).digest())
    return digest.hexdigest()


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores with as many digits as mean something."""
    return dict(zip(scores, round_all(scores.values()), strict=True))


def round_all(values: Iterable[float]) -> list[float]:
    """Numbers with as many digits as mean something."""
    return [float(f"{value:.{DIGITS}g}") for value in values]

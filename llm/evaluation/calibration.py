"""Probabilities of labels from a model's likelihoods, calibrated by one temperature on rows whose labels are known.

A model's likelihoods are often too sure. Dividing their logarithms by a temperature changes no choice, and is what works best
of the simple remedies (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

Letters: N rows, L labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
BINS = 15  # of the expected calibration error, as in the paper
LEAST, MOST = 0.05, 100.0  # temperatures
FEWEST = 20  # rows that choose one


def probabilities(scores: Floats, temperature: float = 1.0) -> Floats:
    """The probability of each label (N, L) from log-likelihoods (N, L); those of a row add up to 1."""
    scaled = scores / temperature
    scaled = np.exp(scaled - scaled.max(1, keepdims=True))
    shares: Floats = scaled / scaled.sum(1, keepdims=True)
    return shares


def best_temperature(scores: Floats, expected: Sequence[int]) -> float:
    """The temperature under which the expected labels are likeliest: golden-section search over its logarithm.

    Each row's label is taken to be another one with the probability 1 / (N + 2), as Platt (1999) does: rows that are all right
    would otherwise ask for a temperature near 0, and whoever reads the probabilities for certainty. The mean negative
    log-likelihood is convex in 1 / temperature, so it has one minimum.
    """
    wrong = 1 / (len(expected) + 2)
    targets = np.full(scores.shape, wrong / (scores.shape[1] - 1))
    targets[np.arange(len(expected)), expected] = 1 - wrong

    def loss(log_temperature: float) -> float:
        scaled = scores / float(np.exp(log_temperature))
        scaled = scaled - scaled.max(1, keepdims=True)
        logarithms = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        return float(-(targets * logarithms).sum(1).mean())

    ratio = (5**0.5 - 1) / 2
    low, high = np.log(LEAST), np.log(MOST)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    for _ in range(60):
        if loss(left) < loss(right):
            high, right = right, left
            left = high - ratio * (high - low)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class Calibration:
    """The temperature to use, and the calibration error before and after, on rows that did not choose it."""

    temperature: float  # 1.0 if another one does not help
    before: float
    after: float  # of the temperatures that were tried

    @property
    def helps(self) -> bool:
        """Whether probabilities are better calibrated with it."""
        return self.after < self.before


def calibrate(scores: Floats, expected: Sequence[int]) -> Calibration:
    """The best temperature for log-likelihoods (N, L), if it helps on rows that did not choose it; 1.0 otherwise.

    Fewer than FEWEST rows choose none. Each half of the rows is judged with the temperature that the other half chooses; the
    one that is kept is chosen by all.
    """
    if len(expected) < FEWEST:
        error = calibration_error(probabilities(scores), expected)
        return Calibration(1.0, error, error)
    found, numbers = np.empty_like(scores), np.array(expected)
    for half in (0, 1):
        other = numbers[1 - half :: 2]
        temperature = best_temperature(scores[1 - half :: 2], other.tolist())
        found[half::2] = probabilities(scores[half::2], temperature)
    before, after = calibration_error(probabilities(scores), expected), calibration_error(found, expected)
    return Calibration(best_temperature(scores, expected) if after < before else 1.0, before, after)


def calibration_error(shares: Floats, expected: Sequence[int]) -> float:
    """The expected calibration error of probabilities (N, L)."""
    return calibration_of(shares.max(1), shares.argmax(1) == np.array(expected))(np.ones(len(shares)))


def calibration_of(sure: Floats, right: npt.NDArray[np.bool_]) -> Callable[[Floats], float]:
    """The expected calibration error as a function of how often each row was drawn: how far the probability `sure` of what was
    chosen is from how often it is `right`, over BINS of equal width, weighted by their rows.
    """
    places, gaps = np.minimum((sure * BINS).astype(np.int64), BINS - 1), sure - right

    def error(draws: Floats) -> float:
        return float(np.abs(np.bincount(places, weights=draws * gaps, minlength=BINS)).sum() / draws.sum())

    return error

"""Probabilities of labels from a model's likelihoods, calibrated by one temperature on rows whose labels are known.

A model's likelihoods are often too sure. Dividing their logarithms by a temperature changes no choice, and is what works best
of the simple remedies (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

Letters: N rows, L labels.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
BINS = 15  # of the expected calibration error, as in the paper
LEAST, MOST = 0.05, 100.0  # temperatures


def probabilities(scores: Floats, temperature: float = 1.0) -> Floats:
    """The probability of each label (N, L) from log-likelihoods (N, L); those of a row add up to 1."""
    scaled = scores / temperature
    scaled = np.exp(scaled - scaled.max(1, keepdims=True))
    shares: Floats = scaled / scaled.sum(1, keepdims=True)
    return shares


def best_temperature(scores: Floats, expected: Sequence[int]) -> float:
    """The temperature under which the expected labels are likeliest: golden-section search over its logarithm.

    The mean negative log-likelihood is convex in 1 / temperature, so it has one minimum.
    """

    def loss(log_temperature: float) -> float:
        found = probabilities(scores, float(np.exp(log_temperature)))[np.arange(len(expected)), expected]
        return float(-np.log(np.maximum(found, 1e-300)).mean())

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


def calibration_error(shares: Floats, expected: Sequence[int]) -> float:
    """The expected calibration error: how far the probability of the likeliest label is from how often it is right, over
    BINS of equal width, weighted by their rows.
    """
    sure, right = shares.max(1), shares.argmax(1) == np.array(expected)
    places = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    gaps = [abs(float((sure - right)[places == one].sum())) for one in range(BINS)]
    return sum(gaps) / len(sure)

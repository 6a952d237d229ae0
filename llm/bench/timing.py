"""Fair comparison of speeds: candidates take turns, so that other work on the machine slows all of them alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from llm.device import seconds_per_call

Key = TypeVar("Key")

LEAST_ROUNDS = 3
TURN_SECONDS = 0.25  # a turn has enough calls that the clock and, on a GPU, the wait at its end do not count


@dataclass(frozen=True)
class Timings:
    """Seconds per call, one number per round; those of one round were measured side by side."""

    first: float  # the very first call: compilation and whatever else is done once
    rounds: list[float]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    @property
    def once(self) -> float:
        """Seconds that the first call took beyond a usual one."""
        return max(0.0, self.first - self.median)


def interleaved(candidates: Mapping[Key, Callable[[], object]], *, seconds: float, device: torch.device) -> dict[Key, Timings]:
    """Time each candidate for about `seconds`, in rounds in which each has a turn; every other round goes backwards.

    Two calls to warm up are left out. There are at least three rounds, however long they take.
    """
    first = {name: seconds_per_call(call, device=device) for name, call in candidates.items()}
    turn = min(TURN_SECONDS, seconds / LEAST_ROUNDS)
    calls = {name: max(1, math.ceil(turn / seconds_per_call(call, device=device))) for name, call in candidates.items()}
    rounds: dict[Key, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    began, done = time.perf_counter(), 0
    while done < LEAST_ROUNDS or time.perf_counter() - began < seconds * len(names):
        for name in names:
            rounds[name].append(seconds_per_call(candidates[name], device=device, calls=calls[name]))
        names.reverse()
        done += 1
    return {name: Timings(first[name], rounds[name]) for name in candidates}


def ratio(timings: Mapping[str, Timings], above: str, below: str) -> float:
    """Seconds of `above` over those of `below`: the median over rounds of the quotient in each."""
    pairs = zip(timings[above].rounds, timings[below].rounds, strict=True)
    return statistics.median(a / b for a, b in pairs)

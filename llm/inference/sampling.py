"""The choice of the next token from the logits of a step, greedy or random. The model and the loop are elsewhere.

Order and distributions are those of Transformers: repetition penalty (also in greedy decoding), then temperature, top-k,
top-p, min-p, each on what the one before has left.

Letters: B prompts, V vocabulary.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is the likeliest one. InputError for a value outside its range."""

    temperature: float = 0.0  # logits are divided by it; 0 is greedy: then only the repetition penalty applies
    top_k: int | None = None  # only the k likeliest, and those equal to the last
    top_p: float | None = None  # only the likeliest that together reach p (nucleus sampling, Holtzman et al. 2020)
    min_p: float | None = None  # only those at least this share as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # tokens of prompt and answer: logits above 0 divided by it, others times it (CTRL, 2019)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a number of at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a whole number of at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0"),
        ):
            if not valid:
                raise InputError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


class RandomStream:
    """Random numbers of one prompt: a function of the seed and the prompt's index among all, not of its batch."""

    def __init__(self, seed: int, index: int) -> None:
        digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))

    def next(self) -> float:
        """Uniform in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


class SeenTokens:
    """Which tokens each prompt and its answer so far contain: those that the repetition penalty applies to."""

    def __init__(self, prompts: Sequence[Sequence[int]], *, vocab_size: int, device: torch.device) -> None:
        seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt)] = True
        self._seen = seen.to(device)  # (B, V)

    def add(self, tokens: Sequence[int]) -> None:
        """Add one more token per row."""
        self._seen.scatter_(1, torch.tensor(tokens, device=self._seen.device)[:, None], True)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these."""
        self._seen = self._seen[torch.tensor(rows, device=self._seen.device)]

    def penalized(self, logits: Tensor, penalty: float) -> Tensor:
        """Logits (B, V) with the penalty of Keskar et al. 2019."""
        return torch.where(self._seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample_tokens(logits: Tensor, sampling: Sampling, *, streams: Sequence[RandomStream]) -> list[int]:
    """The next token of each row of logits (B, V), to which the repetition penalty is already applied."""
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(-1).tolist()]
    cumulative = distribution(logits, sampling).cumsum(-1)
    points = torch.tensor([[stream.next()] for stream in streams], device=logits.device, dtype=cumulative.dtype)
    # The first token whose cumulative probability passes the point. Scaled by the total, so that rounding cannot pass the end.
    places = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    return [int(token) for token in places[:, 0].tolist()]


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) in float64 after temperature, top-k, top-p and min-p, in this order."""
    logits = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # a token stays if those before it do not reach p
        logits = logits.masked_fill((before >= sampling.top_p).scatter(-1, tokens, before >= sampling.top_p), -torch.inf)
    if sampling.min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(sampling.min_p), -torch.inf)
    return logits.softmax(-1)

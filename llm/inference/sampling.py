"""The choice of the next token from the logits of a step, greedy or random. The model and the loop are elsewhere.

Order and distributions are those of Transformers: repetition penalty (also in greedy decoding), then temperature, top-k,
top-p, min-p, each on what the one before has left. OpenAI's penalties and biases come after the repetition penalty, and what
a constraint forbids last, all before the temperature and also in greedy decoding.

Letters: B prompts, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llm.device import widened
from llm.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is the likeliest one. InputError for a value outside its range."""

    temperature: float = 0.0  # logits are divided by it; 0 is greedy: then only the repetition penalty applies
    top_k: int | None = None  # only the k likeliest, and those equal to the last
    top_p: float | None = None  # only the likeliest that together reach p (nucleus sampling, Holtzman et al. 2020)
    min_p: float | None = None  # only those at least this share as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # tokens of prompt and answer: logits above 0 divided by it, others times it (CTRL, 2019)
    presence_penalty: float = 0.0  # subtracted from the logit of each token that the answer has
    frequency_penalty: float = 0.0  # the same, times how often it has it
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a number of at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a whole number of at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
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


class Penalties:
    """What is added to the logits of each row for the tokens of its prompt and its answer so far, and for biases."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], *, vocab_size: int, device: torch.device) -> None:
        self._sampling, shape = sampling, (len(prompts), vocab_size)
        self._seen = self._counts = self._bias = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(shape, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen[row, torch.tensor(prompt)] = True
            self._seen = seen.to(device)  # (B, V)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(shape, device=device)  # (B, V), of the answers
        if sampling.logit_bias:
            if unknown := [token for token in sampling.logit_bias if not 0 <= token < vocab_size]:
                raise InputError(f"logit_bias: expected tokens from 0 to {vocab_size - 1}, got {unknown[0]}")
            self._bias = torch.zeros(vocab_size)
            self._bias[list(sampling.logit_bias)] = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
            self._bias = self._bias.to(device)  # (V,)

    def add(self, tokens: Sequence[int]) -> None:
        """Add one more token per row."""
        if self._seen is not None:
            self._seen.scatter_(1, torch.tensor(tokens, device=self._seen.device)[:, None], True)
        if self._counts is not None:
            places = torch.tensor(tokens, device=self._counts.device)[:, None]
            self._counts.scatter_add_(1, places, torch.ones_like(places, dtype=self._counts.dtype))

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these."""
        if self._seen is not None:
            self._seen = self._seen[torch.tensor(rows, device=self._seen.device)]
        if self._counts is not None:
            self._counts = self._counts[torch.tensor(rows, device=self._counts.device)]

    def applied(self, logits: Tensor) -> Tensor:
        """Logits (B, V) with the penalty of Keskar et al. 2019, then OpenAI's, then the biases."""
        sampling = self._sampling
        if self._seen is not None:
            penalty = sampling.repetition_penalty
            logits = torch.where(self._seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        if self._counts is not None:
            logits = logits - self._counts * sampling.frequency_penalty - (self._counts > 0) * sampling.presence_penalty
        return logits if self._bias is None else logits + self._bias


class Constraint(Protocol):
    """Which tokens one answer may have next: what its grammar allows."""

    def allowed(self) -> Tensor:
        """Which tokens may come next, (V,), on the CPU; an end token only where the answer may end."""

    def accept(self, token: int) -> None:
        """Go on after `token`."""


class TokenChoice:
    """Chooses the tokens of a batch of answers, step by step; `keep` drops rows.

    `indices` number the prompts among all, for their streams of random numbers. `constraint` is of a single answer, and so is
    `watch`, which gets the logits of each step (V,), as the model gives them, and the token chosen.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        *,
        constraint: Constraint | None = None,
        watch: Callable[[Tensor, int], None] | None = None,
    ) -> None:
        self._sampling, self._prompts = sampling, prompts
        self._streams = [RandomStream(sampling.seed, index) for index in indices]
        self._constraint, self._watch = constraint, watch
        self._penalties: Penalties | None = None

    def next(self, logits: Tensor) -> list[int]:
        """The next token of each row of logits (B, V)."""
        if self._penalties is None:
            vocab_size = logits.shape[-1]
            self._penalties = Penalties(self._sampling, self._prompts, vocab_size=vocab_size, device=logits.device)
        adjusted = self._penalties.applied(logits)
        if self._constraint is not None:
            adjusted = adjusted.masked_fill(~self._constraint.allowed().to(logits.device), -torch.inf)
        chosen = sample_tokens(adjusted, self._sampling, streams=self._streams)
        self._penalties.add(chosen)
        if self._constraint is not None:
            self._constraint.accept(chosen[0])
        if self._watch is not None:
            self._watch(logits[0], chosen[0])
        return chosen

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these."""
        self._streams = [self._streams[row] for row in rows]
        if self._penalties is not None:
            self._penalties.keep(rows)


def sample_tokens(logits: Tensor, sampling: Sampling, *, streams: Sequence[RandomStream]) -> list[int]:
    """The next token of each row of logits (B, V), to which penalties are already applied."""
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(-1).tolist()]
    cumulative = distribution(logits, sampling).cumsum(-1)
    points = torch.tensor([[stream.next()] for stream in streams], device=logits.device, dtype=cumulative.dtype)
    # The first token whose cumulative probability passes the point. Scaled by the total, so that rounding cannot pass the end.
    places = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    return [int(token) for token in places[:, 0].tolist()]


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) in the widest dtype after temperature, top-k, top-p and min-p, in this order."""
    logits = widened(logits) / sampling.temperature
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

"""Text from a model, for many prompts at once: one preallocated cache, prompts of different lengths, one token per step.

What comes out for a prompt does not depend on the prompts beside it (up to rounding): each has its own positions in the
cache, and its own stream of random numbers. Tokens in, tokens out; text and chats are the tokenizer's business.

Letters: B prompts, T positions of the longest, V vocabulary.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.models.llama.model import Llama

IDLE = -1  # position of what is neither stored nor seen: padding, and prompts that are done


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is the likeliest one."""

    temperature: float = 0.0  # logits are divided by it; 0 is greedy
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # only the likeliest that together reach p (nucleus sampling, Holtzman et al. 2020)
    seed: int = 0


@dataclass
class Clock:
    """Tokens and seconds of reading prompts and of writing answers; filled in as text is generated."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end: Collection[int],
    sampling: Sampling | None = None,
    batch_size: int = 32,
    clock: Clock | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """New tokens for each prompt, up to and without the first of `end`; fewer where the model's context is full.

    Prompts of similar length share a batch. `progress` is told the number of finished prompts after each batch.
    """
    sampling, clock = sampling or Sampling(), clock or Clock()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        draws = [Draws(sampling.seed, index) for index in chosen]
        batch = _generate_batch(
            model,
            [prompts[index] for index in chosen],
            limit=max_new_tokens,
            end=frozenset(end),
            sampling=sampling,
            draws=draws,
            clock=clock,
        )
        for index, answer in zip(chosen, batch, strict=True):
            answers[index] = answer
        progress(start + len(chosen))
    return answers


def padded(sequences: Sequence[Sequence[int]], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token sequences as tokens and positions, each (B, T); position IDLE where a sequence has ended."""
    length = max(len(sequence) for sequence in sequences)
    tokens = torch.zeros(len(sequences), length, dtype=torch.int64)
    positions = torch.full((len(sequences), length), IDLE)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        positions[row, : len(sequence)] = torch.arange(len(sequence))
    return tokens.to(device), positions.to(device)


@torch.inference_mode()
def _generate_batch(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    end: frozenset[int],
    sampling: Sampling,
    draws: Sequence["Draws"],
    clock: Clock,
) -> list[list[int]]:
    weights = model.model.embed_tokens.weight
    context = model.config.context
    assert context is not None  # every checkpoint says it
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths) > 0, "a prompt has at least its begin token"
    assert max(lengths) <= context, "prompts fit the model's context"
    limits = [min(limit, context - length) for length in lengths]
    answers: list[list[int]] = [[] for _ in prompts]
    if not any(limits):
        return answers
    cache = model.new_cache(len(prompts), max(map(sum, zip(lengths, limits, strict=True))), weights.dtype, weights.device)
    tokens, positions = padded(prompts, device=weights.device)

    began = time.perf_counter()
    hidden = model.hidden(tokens, positions=positions, cache=cache)
    last = torch.tensor([length - 1 for length in lengths], device=weights.device)
    logits = model.lm_head(hidden[torch.arange(len(prompts)), last])  # (B, V)
    clock.prompt_tokens += sum(lengths)
    clock.prompt_seconds += time.perf_counter() - began

    began = time.perf_counter()
    busy = [bound > 0 for bound in limits]
    while True:
        chosen = choose(logits, sampling, draws=draws)
        for row, token in enumerate(chosen):
            if busy[row]:
                answers[row] += [token] if token not in end else []
                busy[row] = token not in end and len(answers[row]) < limits[row]
                clock.new_tokens += 1
        if not any(busy):
            break
        where = [lengths[row] + len(answers[row]) - 1 if busy[row] else IDLE for row in range(len(prompts))]
        tokens, positions = (torch.tensor(column, device=weights.device)[:, None] for column in (chosen, where))
        logits = model(tokens, positions=positions, cache=cache)[:, -1]
    clock.new_seconds += time.perf_counter() - began
    return answers


class Draws:
    """Random numbers of one prompt: a function of the seed and the prompt's place among all, not of its batch."""

    def __init__(self, seed: int, index: int) -> None:
        digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))

    def next(self) -> float:
        """Uniform in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits: Tensor, sampling: Sampling, *, draws: Sequence[Draws]) -> list[int]:
    """The next token of each row of logits (B, V)."""
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(-1).tolist()]
    cumulative = distribution(logits, sampling).cumsum(-1)
    points = torch.tensor([[draw.next()] for draw in draws], device=logits.device, dtype=cumulative.dtype)
    # The first token whose cumulative probability passes the point. Scaled by the total, so that rounding cannot pass the end.
    places = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    return [int(token) for token in places[:, 0].tolist()]


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) in float64 after temperature, top-k and top-p, in this order; ties go to the lower token."""
    ordered, tokens = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[:, sampling.top_k :] = -torch.inf
    probabilities = ordered.softmax(-1)
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # a token stays if those before it do not reach p
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, tokens, probabilities)

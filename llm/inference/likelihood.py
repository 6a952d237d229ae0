"""Log-likelihoods under a model: of windows of text, and of several continuations of one prompt.

Letters: B rows, T positions, D hidden size, N targets.
"""

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm.data.batch import IGNORE
from llm.device import autocast, widest
from llm.inference.batches import Limits, OnProgress, memory_for_batch, similar_lengths, work_in_batches
from llm.inference.processes import ALONE, Processes
from llm.inference.timer import GenerationTimer
from llm.layers.log_probabilities import log_probabilities
from llm.models.interface import Decoding, LanguageModel, as_decoding, precision_of

BATCH_TOKENS = 4096  # positions of one forward pass, padding included; larger is not faster on 2 cores
# Bytes of the activations of one position for each channel of the residual stream, in a layer of the usual proportions.
ACTIVATION_BYTES = 128
SCORES = 2**23  # scores of new positions with all that they may see, in one pass over continuations


@dataclass(frozen=True)
class Window:
    """At most a context of tokens, and the target after each; IGNORE where nothing is scored."""

    tokens: Sequence[int]
    targets: Sequence[int]


@dataclass(frozen=True)
class Choice:
    """A prompt, and the token lists that may follow it; none is empty."""

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """The tokens that a model reads to score it."""
        return len(self.prompt) + sum(len(tokens) - 1 for tokens in self.continuations)


def negative_log_likelihoods(
    model: LanguageModel,
    windows: Sequence[Window],
    *,
    timer: GenerationTimer | None = None,
    processes: Processes = ALONE,
    progress: OnProgress = lambda done, total: None,
) -> list[float]:
    """The sum of -log P over the targets of each window, in nats."""
    memory = memory_for_batch(model.device, processes)
    limits = Limits(BATCH_TOKENS, memory=memory, bytes_per_token=ACTIVATION_BYTES * model.config.hidden_size)
    lengths = {index: len(window.tokens) for index, window in enumerate(windows)}
    found = work_in_batches(
        list(similar_lengths(lengths, limits)),
        lambda batch, timer: _nats(model, [windows[index] for index in batch], timer),
        processes=processes,
        timer=timer or GenerationTimer(),
        progress=progress,
    )
    return [found[index] for index in range(len(windows))]


@torch.inference_mode()
def _nats(model: LanguageModel, windows: Sequence[Window], timer: GenerationTimer) -> list[float]:
    """The sum of -log P of each window, in one forward pass."""
    began = time.perf_counter()
    tokens = torch.zeros(len(windows), max(len(window.tokens) for window in windows), dtype=torch.int64)
    targets = torch.full(tokens.shape, IGNORE)
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
        targets[row, : len(window.targets)] = torch.tensor(window.targets)
    tokens, targets = tokens.to(model.device), targets.to(model.device)
    where = targets != IGNORE
    losses = torch.zeros(tokens.shape, dtype=widest(model.device), device=model.device)
    with autocast(precision_of(model), device=model.device):
        hidden = model.hidden(tokens)[where]
        losses[where] = -log_probabilities(model.lm_head, hidden, targets[where], vocab_size=model.vocab_size)
    nats: list[float] = losses.sum(1).tolist()
    timer.prompt_tokens += sum(len(window.tokens) for window in windows)
    timer.prompt_seconds += time.perf_counter() - began
    return nats


def continuation_likelihoods(
    model: LanguageModel | Decoding,
    choices: Sequence[Choice],
    *,
    memory: float | None = None,
    timer: GenerationTimer | None = None,
    processes: Processes = ALONE,
    progress: OnProgress = lambda done, total: None,
) -> list[list[float]]:
    """log P of each continuation of each choice, in nats. A prompt is read once, and all its continuations together after it.

    `memory` are the bytes that the caches of a batch may take; by default a share of what is free.
    """
    decoding = as_decoding(model)
    limits = Limits(
        BATCH_TOKENS,
        memory=memory_for_batch(decoding.device, processes) if memory is None else memory,
        bytes_per_token=decoding.bytes_per_position,
        bytes_per_row=16.0 * decoding.vocab_size,  # logits after the prompt and their logarithms
    )
    found = work_in_batches(
        list(similar_lengths({index: choice.tokens for index, choice in enumerate(choices)}, limits)),
        lambda batch, timer: _of_continuations(decoding, [choices[index] for index in batch], timer),
        processes=processes,
        timer=timer or GenerationTimer(),
        release=decoding.release,
        progress=progress,
    )
    return [found[index] for index in range(len(choices))]


@torch.inference_mode()
def _of_continuations(decoding: Decoding, choices: Sequence[Choice], timer: GenerationTimer) -> list[list[float]]:
    """log P of the continuations of one batch."""
    began = time.perf_counter()
    passes = _passes(choices)
    room = max((_width(choices, numbers) for numbers in passes), default=0)
    first = decoding.read([choice.prompt for choice in choices], room=room).log_softmax(-1)  # (B, V)
    sums = torch.zeros(len(choices), 1 + max(len(choice.continuations) for choice in choices), dtype=torch.float64)
    for row, choice in enumerate(choices):
        begins = torch.tensor([tokens[0] for tokens in choice.continuations], device=first.device)
        sums[row, : len(begins)] = first[row, begins].cpu().double()
    for numbers in passes:
        tokens, targets, branches = table = torch.zeros(3, len(choices), _width(choices, numbers), dtype=torch.int64)
        branches.fill_(-1)  # padding is a branch of its own, and is summed up in the last column
        for row, choice in enumerate(choices):
            place = 0
            for number in numbers[: bisect_left(numbers, len(choice.continuations))]:
                spelled = torch.tensor(choice.continuations[number])
                stop = place + len(spelled) - 1
                tokens[row, place:stop], targets[row, place:stop], branches[row, place:stop] = (
                    spelled[:-1],
                    spelled[1:],
                    number,
                )
                place = stop
        found = decoding.look_ahead(*table.to(decoding.device)).cpu()
        sums.scatter_add_(1, branches % sums.shape[1], found)
    timer.prompt_tokens += sum(choice.tokens for choice in choices)
    timer.prompt_seconds += time.perf_counter() - began
    return [row[: len(choice.continuations)] for row, choice in zip(sums.tolist(), choices, strict=True)]


def _passes(choices: Sequence[Choice]) -> list[list[int]]:
    """Numbers of the continuations that are read together, of all rows: BATCH_TOKENS positions and SCORES scores, or one."""
    longest = max(len(choice.prompt) for choice in choices)
    passes: list[list[int]] = [[]]
    for number in range(max(len(choice.continuations) for choice in choices)):
        width = _width(choices, [*passes[-1], number])
        positions = len(choices) * width
        if passes[-1] and (positions > BATCH_TOKENS or positions * (longest + width) > SCORES):
            passes.append([])
        passes[-1].append(number)
    return [numbers for numbers in passes if _width(choices, numbers)]


def _width(choices: Sequence[Choice], numbers: Sequence[int]) -> int:
    """Positions that the longest row needs for its continuations of these numbers; their last tokens are not read."""
    return max(
        sum(len(choice.continuations[number]) - 1 for number in numbers if number < len(choice.continuations))
        for choice in choices
    )

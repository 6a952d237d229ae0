"""Tokens from a model, for many prompts at once: a batch of prompts of different lengths, one token of each per step.

The result for a prompt does not depend on the prompts beside it (up to rounding): each has its own positions in the cache and
its own stream of random numbers. Tokens in, tokens out: `llm.inference.streaming` makes text of them, `llm.inference.sampling`
chooses them, and a model's `Decoding` computes the steps.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from llm.errors import InputError
from llm.inference.batches import Limits, memory_for_batch, similar_lengths, work_in_batches
from llm.inference.processes import ALONE, Processes
from llm.inference.sampling import Constraint, Sampling, TokenChoice
from llm.inference.timer import GenerationTimer
from llm.models.interface import Decoding, LanguageModel, as_decoding

MOST_ROWS = {"cpu": 32, "cuda": 256}  # prompts decoded together; not yet measured on a GPU
# Bytes of a row for each token of the vocabulary: logits in their own dtype and in fp32, with a penalty; and if they are
# sampled, the passes of `sampling.distribution` in fp64.
GREEDY_BYTES, SAMPLED_BYTES = 16, 80
KEPT = 1.5  # the rows that go on when others end are copied: half of the cache once more


def generate(
    model: LanguageModel | Decoding,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end: Collection[int],
    sampling: Sampling | None = None,
    batch_size: int | None = None,
    memory: float | None = None,
    timer: GenerationTimer | None = None,
    processes: Processes = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """New tokens for each prompt, up to and without the first of `end`; fewer where the model's context is full.

    Prompts of similar length share a batch, the longest first: at most `batch_size`, and as many as their caches and logits
    fit into `memory` bytes (by default a share of what is free). `progress` gets the number of finished prompts after each
    batch. InputError for a prompt without tokens, or longer than the context. To generate often, pass `model.decoding()`.
    """
    sampling, timer, decoding = sampling or Sampling(), timer or GenerationTimer(), as_decoding(model)
    slots = [len(prompt) + _limit(decoding, prompt, max_new_tokens, place=place) for place, prompt in enumerate(prompts)]
    unfinished = [index for index, prompt in enumerate(prompts) if slots[index] > len(prompt)]

    def answers(chosen: list[int], timer: GenerationTimer) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in chosen]
        read = [prompts[index] for index in chosen]
        for new in decode_steps(
            decoding,
            read,
            limits=[slots[index] - len(prompts[index]) for index in chosen],
            end=end,
            choice=TokenChoice(sampling, read, chosen),
            timer=timer,
        ):
            for row, token in new:
                found[row].append(token)
        return found

    limits = Limits(
        rows=batch_size or MOST_ROWS.get(decoding.device.type, MOST_ROWS["cpu"]),
        memory=memory_for_batch(decoding.device, processes) if memory is None else memory,
        bytes_per_token=KEPT * decoding.bytes_per_position,
        bytes_per_row=decoding.vocab_size * (SAMPLED_BYTES if sampling.temperature else GREEDY_BYTES),
    )
    batches = similar_lengths({index: slots[index] for index in unfinished}, limits)
    found = work_in_batches(
        list(batches),
        answers,
        processes=processes,
        timer=timer,
        release=decoding.release,
        progress=lambda done, _: progress(len(prompts) - len(unfinished) + done),
    )
    return [found.get(index, []) for index in range(len(prompts))]


def generate_one(
    model: LanguageModel | Decoding,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    end: Collection[int],
    sampling: Sampling | None = None,
    index: int = 0,
    constraint: Constraint | None = None,
    watch: Callable[[Tensor, int], None] | None = None,
    on_end: Callable[[], None] = lambda: None,
    timer: GenerationTimer | None = None,
) -> Iterator[int]:
    """The tokens that `generate` gives for this prompt, as the one of this index, one by one.

    `constraint` says which tokens may follow, `watch` gets the logits (V,) of each step and the token chosen, the end token
    too. `on_end` is called if an end token ends the text, and not if its length does.
    """
    sampling, decoding = sampling or Sampling(), as_decoding(model)
    limit = _limit(decoding, prompt, max_new_tokens, place=0)
    if not limit:
        return iter(())
    per_step = decode_steps(
        decoding,
        [prompt],
        limits=[limit],
        end=(),
        choice=TokenChoice(sampling, [prompt], [index], constraint=constraint, watch=watch),
        timer=timer or GenerationTimer(),
    )
    return _until_end((token for new in per_step for _, token in new), end, on_end)


def _until_end(tokens: Iterator[int], end: Collection[int], on_end: Callable[[], None]) -> Iterator[int]:
    for token in tokens:
        if token in end:
            on_end()
            return
        yield token


@torch.inference_mode()
def decode_steps(
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Sequence[int],
    end: Collection[int],
    choice: TokenChoice,
    timer: GenerationTimer,
) -> Iterator[list[tuple[int, int]]]:
    """The new tokens of every step, as (index in `prompts`, token) without end tokens, until all prompts are done.

    Each prompt gets at most its own of `limits`, which are at least 1. Once half of a batch is done, its rows are dropped.
    """
    began = time.perf_counter()
    logits = decoding.read(prompts, room=max(limits))
    logits.sum().item()  # wait for the GPU, for the timer
    timer.prompt_tokens += sum(map(len, prompts))
    timer.prompt_seconds += time.perf_counter() - began
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    left = list(limits)  # tokens that each prompt may still get
    while True:
        began = time.perf_counter()
        chosen = choice.next(logits)
        new = []
        for row, token in zip(rows, chosen, strict=True):
            if left[row]:
                timer.new_tokens += 1
                left[row] = 0 if token in end else left[row] - 1
                new += [(row, token)] if token not in end else []
        timer.new_seconds += time.perf_counter() - began
        yield new
        began = time.perf_counter()
        busy = [place for place, row in enumerate(rows) if left[row]]
        if not busy:
            return
        if 2 * len(busy) <= len(rows):
            rows, chosen = [rows[place] for place in busy], [chosen[place] for place in busy]
            decoding.keep(busy)
            choice.keep(busy)
        logits = decoding.step(chosen)
        timer.new_seconds += time.perf_counter() - began


def _limit(decoding: Decoding, prompt: Sequence[int], max_new_tokens: int, *, place: int) -> int:
    """How many new tokens the prompt may get."""
    context = decoding.context
    if not 0 < len(prompt) <= context:
        raise InputError(f"prompt {place}: expected from 1 token to the model's context of {context:,}, got {len(prompt):,}")
    return min(max_new_tokens, context - len(prompt))

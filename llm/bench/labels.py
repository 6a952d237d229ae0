"""Classification by the likelihood of labels: prompts read once for all labels, beside a forward pass of each pair."""

from functools import partial
from typing import Any

import torch

from llm.bench.implementations import CountingRows
from llm.bench.timing import interleaved, ratio
from llm.bench.workload import Workload
from llm.data.batch import IGNORE
from llm.device import resolve_precision
from llm.inference.likelihood import Choice, Window, continuation_likelihoods, negative_log_likelihoods
from llm.models.interface import LanguageModel, dtype_of

PROMPTS = 8
LABELS = 12
LABEL_TOKENS = (2, 5)  # of the shortest label and of the longest, end token included
PROMPT_TOKENS = 256


def measure_labels(workload: Workload, model: LanguageModel, *, seconds: float, device: torch.device) -> dict[str, Any]:
    """Prompts per second both ways, and the largest relative difference of their log-probabilities."""
    dtype = dtype_of(resolve_precision(workload.precision, device=device))
    model.to(device, dtype).eval()
    prompts, labels = _prompts(workload), _labels(workload)
    choices = [Choice(prompt, labels) for prompt in prompts]
    windows = [_window(prompt, label) for prompt in prompts for label in labels]
    shared = partial(continuation_likelihoods, model.decoding(), choices)
    full = partial(negative_log_likelihoods, model, windows)
    ours = torch.tensor(shared())
    wanted = -torch.tensor(full()).view(ours.shape)
    timings = interleaved({"shared": shared, "full": full}, seconds=seconds, device=device)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": PROMPTS,
        "prompt_tokens": len(prompts[0]),
        "labels": LABELS,
        "largest_difference": float(((ours - wanted) / wanted).abs().max()),
        "shared": PROMPTS / timings["shared"].median,
        "full": PROMPTS / timings["full"].median,
        "shared_times_as_fast": ratio(timings, "full", "shared"),
    }


def _prompts(workload: Workload) -> list[list[int]]:
    rows = CountingRows(workload.context, workload.vocab_size)
    size = min(PROMPT_TOKENS, workload.context - LABEL_TOKENS[1])
    return [rows.row(index).tokens[:size].tolist() for index in range(PROMPTS)]


def _labels(workload: Workload) -> list[list[int]]:
    shortest, longest = LABEL_TOKENS
    lengths = [shortest + index % (longest - shortest + 1) for index in range(LABELS)]
    return [[(7 * index + place) % workload.vocab_size for place in range(size)] for index, size in enumerate(lengths)]


def _window(prompt: list[int], label: list[int]) -> Window:
    tokens = [*prompt, *label]
    return Window(tokens[:-1], [IGNORE] * (len(prompt) - 1) + label)

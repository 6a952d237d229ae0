"""Log-likelihoods under a model: of windows of text, and of several labels after one prompt.

Letters: B rows, T positions, D hidden size, L labels, N targets, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llm.data.batch import IGNORE
from llm.inference.generate import GenerationTimer
from llm.models.interface import Decoding, LanguageModel, as_decoding

BATCH_TOKENS = 4096  # positions of one forward pass, padding included; larger is not faster on 2 cores
LOGITS = 2**24  # numbers in one piece of logits: 64 MiB

OnProgress = Callable[[int, int], None]  # rows done, rows in all; may raise to stop


@dataclass(frozen=True)
class Window:
    """At most a context of tokens, and the target after each; IGNORE where nothing is scored."""

    tokens: Sequence[int]
    targets: Sequence[int]


@torch.inference_mode()
def negative_log_likelihoods(
    model: LanguageModel,
    windows: Sequence[Window],
    *,
    timer: GenerationTimer | None = None,
    progress: OnProgress = lambda done, total: None,
) -> list[float]:
    """The sum of -log P over the targets of each window, in nats."""
    timer = timer or GenerationTimer()
    device = model.device
    result = [0.0] * len(windows)
    done = 0
    for batch in similar_lengths([len(window.tokens) for window in windows]):
        began = time.perf_counter()
        tokens = torch.zeros(len(batch), len(windows[batch[0]].tokens), dtype=torch.int64)
        targets = torch.full(tokens.shape, IGNORE)
        for row, window in enumerate(windows[index] for index in batch):
            tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
            targets[row, : len(window.targets)] = torch.tensor(window.targets)
        tokens, targets = tokens.to(device), targets.to(device)
        where = targets != IGNORE
        losses = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
        losses[where] = _token_losses(model, model.hidden(tokens)[where], targets[where])
        for index, loss in zip(batch, losses.sum(1).tolist(), strict=True):
            result[index] = loss
        timer.prompt_tokens += sum(len(windows[index].tokens) for index in batch)
        timer.prompt_seconds += time.perf_counter() - began
        progress(done := done + len(batch), len(windows))
    return result


def _token_losses(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target (N,) from hidden states (N, D), in pieces: all logits at once are too large."""
    piece = max(1, LOGITS // model.vocab_size)
    losses = [
        cross_entropy(model.lm_head(part).float(), wanted, reduction="none").double()
        for part, wanted in zip(torch.split(hidden, piece), torch.split(targets, piece), strict=True)
    ]
    return torch.cat(losses)


@torch.inference_mode()
def label_likelihoods(
    model: LanguageModel | Decoding,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    timer: GenerationTimer | None = None,
) -> Tensor:
    """log P(label | prompt) as (B, L) in float64. Prompts are read into the cache once, and every label after them."""
    timer = timer or GenerationTimer()
    began = time.perf_counter()
    decoding = as_decoding(model)
    logits = decoding.read(prompts, room=max(map(len, labels)))
    first = logits.log_softmax(-1)  # (B, V)
    sums = []
    for label in labels:
        total = first[:, label[0]].double()
        if len(label) > 1:
            tokens = torch.tensor(label, device=logits.device).expand(len(prompts), -1)
            rest = decoding.look_ahead(tokens[:, :-1]).log_softmax(-1)  # (B, T, V)
            total = total + rest.gather(-1, tokens[:, 1:, None]).double().sum((1, 2))
        sums.append(total)
    likelihoods = torch.stack(sums, 1)
    timer.prompt_tokens += sum(len(prompt) for prompt in prompts) + len(prompts) * sum(len(label) - 1 for label in labels)
    timer.prompt_seconds += time.perf_counter() - began
    return likelihoods


def similar_lengths(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in groups of similar length, at most BATCH_TOKENS positions with padding; the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = max(1, BATCH_TOKENS // lengths[order[start]])
        yield order[start : start + size]
        start += size

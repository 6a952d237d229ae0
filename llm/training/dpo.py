"""Direct preference optimisation (Rafailov et al. 2023): an objective over pairs of answers, and its reference.

A row holds pairs: documents 2i and 2i + 1 are the chosen and the rejected answer of pair i, each after the prompt. So a pair
stays together, however rows are split into micro-batches and processes. The reference is the model before training: it gives
each token a log-probability once, and these are stored with the rows.

Letters: B rows, T positions, N positions with a target, P pairs of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm.data.batch import IGNORE, Batch, collate
from llm.data.packing import PackedRows
from llm.device import Precision, autocast
from llm.errors import Interrupted
from llm.models.interface import LanguageModel
from llm.training.loss import token_losses

POSITIONS = 4096  # of one forward pass of the reference


@dataclass(frozen=True)
class PreferenceLoss:
    """-log sigmoid(m) of each pair's margin m = beta ((log p - log p_reference)(chosen) - the same of rejected).

    With label smoothing e, a share e of the pairs is assumed to be labelled the wrong way round (Mitchell 2023):
    -(1 - e) log sigmoid(m) - e log sigmoid(-m).
    """

    beta: float
    label_smoothing: float = 0.0

    watched: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin")  # share of margins above 0, and their mean

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, ...]:
        """Sums over the batch's pairs: the loss, pairs, margins above 0, margins."""
        gains = answer_gains(model, batch)  # (B, 2 P)
        margins = self.beta * (gains[:, 0::2] - gains[:, 1::2])  # (B, P)
        pairs = (batch.documents.amax(1) + 1) // 2  # (B,)
        exists = torch.arange(margins.shape[1], device=margins.device) < pairs[:, None]
        margins = margins[exists]
        smooth = self.label_smoothing
        loss = -(1 - smooth) * logsigmoid(margins) - smooth * logsigmoid(-margins)
        seen = margins.detach()
        return loss.sum(), pairs.sum(), (seen > 0).sum(), seen.sum()


def answer_gains(model: LanguageModel, batch: Batch) -> Tensor:
    """log p(answer) - log p_reference(answer) of each document of each row, (B, documents); their number is even."""
    assert batch.reference is not None  # rows of pairs have one
    hidden = model.hidden(batch.tokens, documents=batch.documents, positions=batch.positions)
    learned = batch.targets != IGNORE  # (B, T)
    gains = -token_losses(model.lm_head, hidden[learned], batch.targets[learned]) - batch.reference[learned]  # (N,)
    most = int(batch.documents.max()) + 1
    place = (torch.arange(len(learned), device=learned.device)[:, None] * most + batch.documents)[learned]
    return gains.new_zeros(len(learned) * most).index_add(0, place, gains).view(-1, most)


@torch.no_grad()
def write_reference(
    folder: Path,
    model: LanguageModel,
    *,
    precision: Precision,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> None:
    """Store beside the rows packed in `folder` the log-probability that `model` gives each target, in training's precision."""
    rows = PackedRows(folder, seed=None)
    device = model.device
    model.eval()

    def log_probabilities(indices: range) -> NDArray[np.float32]:
        report(done=indices.start, total=rows.rows_per_epoch, unit="rows of the reference")
        if should_stop():
            raise Interrupted("stopped while the reference was computed")
        batch = collate([rows.row(index) for index in indices], indices).to(device)
        learned = batch.targets != IGNORE
        found = torch.zeros(learned.shape, device=device)
        with autocast(precision, device=device):
            hidden = model.hidden(batch.tokens, documents=batch.documents, positions=batch.positions)
            found[learned] = -token_losses(model.lm_head, hidden[learned], batch.targets[learned])
        values: NDArray[np.float32] = found.cpu().numpy()
        return values

    rows.write_reference(log_probabilities, rows_at_a_time=max(1, POSITIONS // rows.context))

"""Rows of packed documents, and batches of them. `llm.data.token_rows` and `llm.data.packing` are sources of rows.

A source of rows is a pure function of the row's index, so the order of data depends only on the seed and the step; a restart
or another number of processes does not change it. Rows are numpy and batches are torch, which is imported only when a batch is
made, because processes that pack rows do not need it.

Letters: B rows in a batch, T tokens in a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, device

IGNORE = -100  # a target that the loss does not count; the default ignore_index of torch's cross_entropy


@dataclass(frozen=True)
class PackedRow:
    """One row of a batch: documents, or pieces of them, one after the other."""

    tokens: NDArray[np.int64]  # (T,)
    targets: NDArray[np.int64]  # (T,) the next token of the same document, or IGNORE
    documents: NDArray[np.int32]  # (T,) number of the document in this row, from 0; -1 on padding
    reference: NDArray[np.float32] | None = None  # (T,) a reference model's log-probability of each target
    sources: NDArray[np.int32] | None = None  # (T,) for held-out rows: the number of the source that each target counts for
    text_bytes: NDArray[np.float32] | None = None  # (T,) for held-out rows of text: the bytes that each token stands for
    weights: NDArray[np.float32] | None = None  # (T,) how often each target counts in the loss, 0 without one; None: once


class RowSource(Protocol):
    """Rows of equal length in an order fixed by the seed."""

    @property
    def context(self) -> int:
        """Tokens in a row."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows until the data has been seen once."""

    def row(self, index: int) -> PackedRow:
        """Row `index`, counted through all epochs; the order within epoch e is drawn from (seed, e)."""


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, with what the model needs to keep documents separate."""

    tokens: "Tensor"  # (B, T) int64
    targets: "Tensor"  # (B, T) int64, already shifted; IGNORE where the loss counts nothing
    documents: "Tensor"  # (B, T) int32, -1 on padding
    positions: "Tensor"  # (B, T) int64, from 0 in each document
    rows: "Tensor"  # (B,) int64, index of the row within its optimizer step; the key of dropout
    reference: "Tensor | None" = None  # (B, T), for preferences: documents 2i and 2i + 1 are the two answers of pair i
    sources: "Tensor | None" = None  # (B, T) int32, of held-out rows
    text_bytes: "Tensor | None" = None  # (B, T) float32, of held-out rows of text
    weights: "Tensor | None" = None  # (B, T) float32: how often each target counts

    @property
    def loss_count(self) -> float:
        """The number that the loss of a step is divided by: targets, by their weights, or pairs if answers are compared."""
        if self.weights is not None:
            from llm.device import widened

            return float(widened(self.weights).sum())
        if self.reference is None:
            return int((self.targets != IGNORE).sum())
        return int(((self.documents.amax(1) + 1) // 2).sum())

    def to(self, device: "device | str") -> "Batch":
        """The same batch on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, most: int) -> "list[Batch]":
        """The same rows as batches of at most `most` rows."""
        return [self._each(itemgetter(slice(start, start + most))) for start in range(0, len(self.rows), most)]

    def _each(self, change: "Callable[[Tensor], Tensor]") -> "Batch":
        values = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if value is None else change(value) for value in values))  # type: ignore[arg-type]  # the last may be


def collate(rows: Sequence[PackedRow], indices: Sequence[int]) -> Batch:
    """A batch of `rows`, whose indices within the optimizer step are `indices`."""
    import torch

    documents = np.stack([row.documents for row in rows])
    optional = {}
    for name in ("reference", "sources", "text_bytes"):
        if all(getattr(row, name) is not None for row in rows):
            optional[name] = torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
    if any(row.weights is not None for row in rows):  # those that are mixed in have none
        weights = [(row.targets != IGNORE).astype(np.float32) if row.weights is None else row.weights for row in rows]
        optional["weights"] = torch.from_numpy(np.stack(weights))
    return Batch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        targets=torch.from_numpy(np.stack([row.targets for row in rows])),
        documents=torch.from_numpy(documents),
        positions=torch.from_numpy(positions_within(documents)),
        rows=torch.tensor(indices, dtype=torch.int64),
        **optional,
    )


def positions_within(documents: NDArray[np.int32]) -> NDArray[np.int64]:
    """Distance of each token from the first token of its document in this row; (B, T) to (B, T)."""
    columns = np.broadcast_to(np.arange(documents.shape[1], dtype=np.int64), documents.shape)
    starts = np.ones(documents.shape, dtype=bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)  # column of the first token of this document
    return columns - first

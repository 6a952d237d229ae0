"""What a training eats: rows of packed documents, and batches of them. Not where they come from: `llm.data.token_shards`, `llm.data.chat_dataset`.

A source of rows is a pure function of the row's index, so the order of data depends on the seed and the step alone, and
neither a restart nor the number of processes changes it. Rows are numpy, batches are torch; torch is imported only when
a batch is made, because rows are also packed by processes that never compute with them.

Letters: B rows in a batch, T tokens in a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, device

IGNORE = -100  # as a target: nothing is learned here; the value that torch's cross_entropy leaves out by default


@dataclass(frozen=True)
class PackedRow:
    """One row of a batch: documents, or pieces of them, one after the other."""

    tokens: NDArray[np.int64]  # (T,)
    targets: NDArray[np.int64]  # (T,) the token after this one in the same document; IGNORE where nothing is learned
    documents: NDArray[np.int32]  # (T,) which document of this row, counted from 0; -1 on padding
    reference: NDArray[np.float32] | None = None  # (T,) what a reference model gives each target, as a log-probability


class RowSource(Protocol):
    """Rows of equal length in an order that is fixed by the seed."""

    @property
    def context(self) -> int:
        """Tokens in a row."""
        ...

    @property
    def rows_per_epoch(self) -> int:
        """Rows until the data has been seen once."""
        ...

    def row(self, index: int) -> PackedRow:
        """Row `index`, which counts on through epochs; the order within epoch e is drawn from (seed, e)."""
        ...


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, with what the model needs to keep documents apart."""

    tokens: "Tensor"  # (B, T) int64
    targets: "Tensor"  # (B, T) int64, already shifted; IGNORE where nothing is learned
    documents: "Tensor"  # (B, T) int32, -1 on padding
    positions: "Tensor"  # (B, T) int64, from 0 in each document
    rows: "Tensor"  # (B,) int64, index of the row within its optimizer step: what dropout is keyed by
    reference: "Tensor | None" = None  # (B, T) of rows of pairs: documents 2i and 2i + 1 are the two answers of pair i

    @property
    def counted(self) -> int:
        """What the loss of a step is divided by: learned targets, or pairs where it is pairs that are compared."""
        if self.reference is None:
            return int((self.targets != IGNORE).sum())
        return int(((self.documents.amax(1) + 1) // 2).sum())

    def to(self, device: "device | str") -> "Batch":
        """The same batch in the memory of `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, most: int) -> "list[Batch]":
        """Batches of at most `most` rows that make up this one."""
        return [self._each(itemgetter(slice(start, start + most))) for start in range(0, len(self.rows), most)]

    def _each(self, change: "Callable[[Tensor], Tensor]") -> "Batch":
        values = (self.tokens, self.targets, self.documents, self.positions, self.rows, self.reference)
        return Batch(*(None if value is None else change(value) for value in values))  # type: ignore[arg-type]  # only the last is


def collate(rows: Sequence[PackedRow], indices: Sequence[int]) -> Batch:
    """A batch of `rows`, which are those with `indices` within their optimizer step."""
    import torch

    documents = np.stack([row.documents for row in rows])
    references = [row.reference for row in rows if row.reference is not None]
    return Batch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        targets=torch.from_numpy(np.stack([row.targets for row in rows])),
        documents=torch.from_numpy(documents),
        positions=torch.from_numpy(positions_within(documents)),
        rows=torch.tensor(indices, dtype=torch.int64),
        reference=torch.from_numpy(np.stack(references)) if references else None,
    )


def positions_within(documents: NDArray[np.int32]) -> NDArray[np.int64]:
    """Distance of each token from the first of its document in this row; (B, T) to (B, T)."""
    columns = np.broadcast_to(np.arange(documents.shape[1], dtype=np.int64), documents.shape)
    starts = np.ones(documents.shape, dtype=bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)  # column where the document of this token began
    return columns - first

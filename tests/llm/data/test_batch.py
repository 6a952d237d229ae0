"""Batches of packed rows."""

import numpy as np
import torch

from llm.data.batch import IGNORE, PackedRow, collate


def row_of(documents: list[int]) -> PackedRow:
    count = len(documents)
    return PackedRow(np.arange(count), np.full(count, IGNORE), np.array(documents, dtype=np.int32))


def test_positions_restart_at_each_document_and_at_each_row() -> None:
    batch = collate([row_of([0, 0, 0, 1, 1, 2]), row_of([0, 1, 1, -1, -1, -1])], [4, 5])
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 0, 1, 2]]


def test_a_batch_keeps_rows_in_order_and_knows_their_place_in_the_step() -> None:
    rows = [row_of([0, 0]), row_of([0, 1])]
    batch = collate(rows, [7, 3])
    assert batch.rows.tolist() == [7, 3]
    assert batch.documents.tolist() == [[0, 0], [0, 1]]
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
    assert batch.documents.dtype == torch.int32


def test_moving_a_batch_keeps_what_it_holds() -> None:
    batch = collate([row_of([0, 0])], [0])
    moved = batch.to("cpu")
    assert moved.reference is None
    assert all(torch.equal(getattr(moved, name), value) for name, value in vars(batch).items() if value is not None)

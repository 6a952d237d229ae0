"""Batches that are made in the background."""

from dataclasses import dataclass, field
from threading import Barrier

from tiny_training import MadeUpRows

from llm.data.batch import PackedRow
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import feed


@dataclass(frozen=True)
class MeetingRows(MadeUpRows):
    """Rows of which none is there before four are asked for."""

    barrier: Barrier = field(default_factory=lambda: Barrier(4, timeout=20))

    def row(self, index: int) -> PackedRow:
        self.barrier.wait()
        return super().row(index)


def test_rows_of_a_step_are_read_at_once_and_come_in_their_order() -> None:
    rows = MeetingRows()
    steps = list(feed(rows, ProcessGroup(), 3, 8, range(2, 5), lambda step: step + 1))
    for step, (parts, targets) in zip(range(3, 6), steps, strict=True):
        assert [len(part.rows) for part in parts] == [3, 3, 2]
        expected = [MadeUpRows().row(step * 8 + index) for index in range(8)]
        assert [row.tolist() for part in parts for row in part.tokens] == [row.tokens.tolist() for row in expected]
        assert [index for part in parts for index in part.rows.tolist()] == list(range(8))
        assert targets == sum(int((row.targets >= 0).sum()) for row in expected)

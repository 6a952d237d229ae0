"""Best-fit packing: every piece whole in one row, little padding."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llm.data.packing import best_fit


@given(st.lists(st.integers(min_value=1, max_value=40), max_size=60))
def test_every_piece_is_in_exactly_one_row_and_no_row_overflows(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), capacity=40)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 40 for row in rows)


@given(st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=60))
def test_no_two_rows_could_have_been_one(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), capacity=40)
    fills = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > 40


def test_a_piece_goes_where_it_leaves_the_least_room() -> None:
    # 7 and 5 open rows with 3 and 5 left; 3 fills the first exactly, and the 5 that is left takes another 5
    assert best_fit(np.array([7, 5, 3, 5]), capacity=10) == [[0, 2], [1, 3]]


def test_lengths_of_medical_questions_and_answers_fill_rows_to_97_percent() -> None:
    # MedQuAD pairs are roughly log-normal in tokens: median near 150, some at the length of a whole row
    drawn = np.exp(np.random.default_rng(0).normal(5.0, 0.8, size=10_000)).astype(np.int64)
    for capacity in (256, 512, 1024):
        lengths = drawn.clip(8, capacity)
        rows = best_fit(lengths, capacity=capacity)
        assert lengths.sum() / (len(rows) * capacity) >= 0.97

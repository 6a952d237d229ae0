"""Pseudorandom orders that are computed place by place."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.permutation import BLOCK, Permutation, RowOrder


@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_every_number_is_hit_once(size: int, seed: int, epoch: int) -> None:
    found = Permutation(size, (seed, epoch))(np.arange(size))
    assert np.array_equal(np.sort(found), np.arange(size))
    assert np.array_equal(Permutation(size, (seed, epoch)).inverse(found), np.arange(size))


def test_each_part_of_the_key_changes_the_order() -> None:
    numbers = np.arange(500)
    orders = [tuple(Permutation(500, key)(numbers)) for key in ((1, 0), (1, 1), (2, 0), (0, 1))]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("size", [17, 64, 65])
def test_every_place_gets_every_number_about_equally_often(size: int) -> None:
    draws = 1000
    orders = np.stack([Permutation(size, (5, key))(np.arange(size)) for key in range(draws)])
    counts = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    chi_square = ((counts - draws / size) ** 2 / (draws / size)).sum() / (size - 1) ** 2  # 1 if all orders were equally likely
    assert 0.8 < chi_square < 1.2


def test_neighbours_do_not_stay_neighbours() -> None:
    found = Permutation(10_000, (3, 0))(np.arange(10_000))
    assert (np.abs(np.diff(found)) == 1).sum() < 10  # 2 are expected
    assert abs(np.corrcoef(np.arange(10_000), found)[0, 1]) < 0.05


def test_a_place_far_out_in_a_huge_order_takes_no_memory() -> None:
    order = RowOrder(10**12, seed=1)
    tracemalloc.start()
    found = {order(index).row for index in range(5 * 10**11, 5 * 10**11 + 2 * BLOCK)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 2 * BLOCK
    assert peak < 2 * 2**20


def test_an_epoch_has_every_row_once_and_another_order_than_the_one_before() -> None:
    order = RowOrder(2500, seed=7)
    epochs = [[order(epoch * 2500 + place) for place in range(2500)] for epoch in range(2)]
    for number, places in enumerate(epochs):
        assert {place.epoch for place in places} == {number}
        assert sorted(place.row for place in places) == list(range(2500))
    assert [place.row for place in epochs[0]] != [place.row for place in epochs[1]]


def test_without_a_seed_rows_come_as_they_lie() -> None:
    order = RowOrder(3, seed=None)
    assert [tuple(order(index)) for index in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]

"""Choices among items: shares, passes, even spacing, batches."""

import pytest

from llm.text.selection import evenly_spaced, hash_share, in_batches, passes


def test_shares_of_texts_are_uniform() -> None:
    shares = [hash_share(f"text {number}") for number in range(4000)]
    for tenth in range(10):
        assert 340 < sum(tenth / 10 <= share < (tenth + 1) / 10 for share in shares) < 460  # 400 +- 3 deviations


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 0), (0.5, 1), (0.25, 0), (2.0, 2), (2.5, 3)])
def test_a_fraction_of_a_weight_keeps_items_whose_share_is_below_it(weight: float, expected: int) -> None:
    assert passes(weight, 0.3) == expected


def test_items_are_evenly_spaced_and_never_more_than_there_are() -> None:
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert evenly_spaced("abc", 7) == ["a", "b", "c"]
    assert evenly_spaced("abc", 0) == evenly_spaced("", 2) == []


def test_batches_hold_all_items_in_order() -> None:
    assert list(in_batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(in_batches([], 2)) == []

"""Dropout by counters: the right rate, and the same mask wherever a row is computed."""

import pytest
import torch
from torch import Tensor, nn

from llm.layers.dropout import Dropout, set_counters


def mask(rows: list[int], *, rate: float = 0.1, seed: int = 0, step: int = 0, length: int = 64, channels: int = 33) -> Tensor:
    dropout = Dropout(rate).train()
    set_counters(dropout, seed=seed, step=step, rows=torch.tensor(rows))
    return dropout(torch.ones(len(rows), length, channels)) != 0


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_the_rate_is_right_overall_and_in_every_channel_and_position(rate: float) -> None:
    dropped = ~mask(list(range(64)), rate=rate, channels=64)
    spread = (rate * (1 - rate)) ** 0.5
    # Five standard deviations: of 262,144 draws, and of 4,096 draws for each channel and position.
    assert dropped.float().mean().item() == pytest.approx(rate, abs=5 * spread / 512)
    for dimensions in ((0, 1), (0, 2), (1, 2)):
        assert (dropped.float().mean(dimensions) - rate).abs().max() < 5 * spread / 64


def test_neighbours_are_independent() -> None:
    dropped = (~mask(list(range(64)), rate=0.5, channels=64)).float() - 0.5
    for shifted in (dropped[1:] * dropped[:-1], dropped[:, 1:] * dropped[:, :-1], dropped[..., 1:] * dropped[..., :-1]):
        assert shifted.mean().abs().item() < 5 * 0.25 / shifted.numel() ** 0.5  # five standard deviations of the product


def test_kept_values_are_scaled_so_that_the_mean_stays() -> None:
    dropout = Dropout(0.25).train()
    set_counters(dropout, seed=0, step=0, rows=torch.arange(4))
    values = dropout(torch.ones(4, 8, 8)).unique().tolist()
    assert values == pytest.approx([0, 4 / 3])


def test_a_row_has_the_same_mask_in_any_batch() -> None:
    whole = mask([0, 1, 2, 3, 4])
    assert torch.equal(whole[3:4], mask([3]))
    assert torch.equal(whole[[4, 1]], mask([4, 1]))


def test_seed_step_row_and_site_all_change_the_mask() -> None:
    first = mask([0])
    for other in (mask([0], seed=1), mask([0], step=1), mask([1])):
        assert 0.1 < (first != other).float().mean() < 0.26  # 0.18 for independent masks
    twice = nn.Sequential(Dropout(0.1), Dropout(0.1)).train()
    set_counters(twice, seed=0, step=0, rows=torch.tensor([0]))
    x = torch.ones(1, 64, 33)
    assert not torch.equal(twice[0](x), twice[1](x))


def test_nothing_is_dropped_outside_training() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_training_without_counters_is_refused() -> None:
    with pytest.raises(RuntimeError, match="set_counters"):
        Dropout(0.5).train()(torch.ones(1, 1, 1))

"""Bootstrap resamples: reproducible, unbiased, and scored as the whole is scored."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from llm.evaluation.bootstrap import RESAMPLES, fingerprint, macro_f1, resample, resamples
from llm.evaluation.chrf_bleu import ChrfBleu


def test_every_resample_draws_as_many_examples_as_there_are_and_the_same_each_time() -> None:
    first, again = (np.array(list(resamples(20))) for _ in range(2))
    assert first.shape == (RESAMPLES, 20)
    assert (first.sum(1) == 20).all() and (first == again).all()
    assert first.mean() == 1.0 and np.abs(first.mean(0) - 1).max() < 0.2  # no example is preferred


def test_the_deviation_of_a_mean_is_that_of_the_formula() -> None:
    values = np.random.default_rng(1).normal(size=400)
    (means,) = resample(400, lambda draws: {"mean": float(draws @ values / 400)}).values()
    assert np.std(means) == pytest.approx(np.std(values) / 20, rel=0.1)
    assert np.mean(means) == pytest.approx(values.mean(), abs=0.01)


def test_macro_f1_of_drawn_rows_equals_that_of_repeated_rows() -> None:
    random = np.random.default_rng(2)
    wanted, found = random.integers(4, size=60), random.integers(4, size=60)
    score = macro_f1(wanted, found, 4)
    for draws in list(resamples(60))[:20]:
        rows = np.repeat(np.arange(60), draws.astype(int))
        seen = sorted({*wanted[rows], *found[rows]})
        assert score(draws) == pytest.approx(
            f1_score(wanted[rows], found[rows], labels=seen, average="macro", zero_division=0)
        )
    whole = f1_score(wanted, found, labels=range(6), average="macro", zero_division=0)
    assert macro_f1(wanted, found, 6)(np.ones(60)) == pytest.approx(whole)


def test_chrf_and_bleu_of_drawn_pairs_equal_those_of_repeated_pairs() -> None:
    found = ["the heart pumps blood", "a fever is hot", "liver"]
    wanted = ["the heart pumps the blood", "a fever is a sign of illness", "the liver is red"]
    draws = np.array([2.0, 0.0, 1.0])
    twice = [found[0], found[0], found[2]], [wanted[0], wanted[0], wanted[2]]
    assert ChrfBleu(found, wanted).score(draws) == pytest.approx(ChrfBleu(*twice).scores, rel=1e-5)


def test_other_examples_or_another_order_have_another_fingerprint() -> None:
    assert fingerprint(["a", "b"]) == fingerprint(iter(["a", "b"]))
    assert len({fingerprint(rows) for rows in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5

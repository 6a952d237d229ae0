"""Gates: verdicts from scores."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from runner.errors import RecipeError
from runner.gates import Gate, judge

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(value=numbers, bound=numbers)
def test_at_least_and_at_most_compare_with_the_bound_included(value: float, bound: float) -> None:
    lower, upper = judge([Gate(score="a.b", at_least=bound), Gate(score="a.b", at_most=bound)], {"a.b": value})
    assert lower.passed == (value >= bound)
    assert upper.passed == (value <= bound)


def test_a_verdict_says_value_bound_and_outcome() -> None:
    (verdict,) = judge([Gate(score="section.macro_f1", at_least=0.9)], {"section.macro_f1": 0.8996})
    assert str(verdict) == "section.macro_f1 = 0.8996, wanted at least 0.9: failed"


def test_a_score_that_is_not_a_number_passes_no_gate() -> None:
    nan = {"a.b": float("nan")}
    assert not any(verdict.passed for verdict in judge([Gate(score="a.b", at_least=0), Gate(score="a.b", at_most=0)], nan))


def test_an_unknown_score_is_reported_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"'section.macro-f1'.*did you mean 'section.macro_f1'"):
        judge([Gate(score="section.macro-f1", at_least=0.9)], {"section.macro_f1": 1.0, "text.perplexity": 3.0})


def test_an_unknown_score_far_from_any_name_is_reported_with_all_names() -> None:
    with pytest.raises(RecipeError, match=r"there are section.macro_f1, text.perplexity"):
        judge([Gate(score="zzz", at_least=0.9)], {"text.perplexity": 3.0, "section.macro_f1": 1.0})


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0.5, "at_most": 0.9}])
def test_a_gate_has_exactly_one_bound(bounds: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="exactly one of at_least and at_most"):
        Gate(score="a.b", **bounds)


def test_judging_imports_no_torch_and_no_hub() -> None:
    code = "import sys, runner.gates; assert not {'torch', 'numpy', 'huggingface_hub', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

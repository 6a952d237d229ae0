"""Gates: verdicts from scores, and how sure they are."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llm.evaluation.bootstrap import resample
from runner.artifacts import Scores
from runner.errors import RecipeError
from runner.gates import EvaluationResult, Gate, interval, judge, train_gap
from runner.stage import Lineage, Ref

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
SPREAD = " ".join(f"{0.80 + step * 0.0002:.4f}" for step in range(1001))  # evenly from 0.8 to 1.0


def found(scores: Mapping[str, float], **replicates: str) -> EvaluationResult:
    named = {name.replace("__", "."): text for name, text in replicates.items()}
    return EvaluationResult(scores, named, {"a": "rows"})


@given(value=numbers, bound=numbers)
def test_at_least_and_at_most_compare_with_the_bound_included(value: float, bound: float) -> None:
    lower, upper = judge([Gate(score="a.b", at_least=bound), Gate(score="a.b", at_most=bound)], found({"a.b": value}))
    assert lower.passed == (value >= bound)
    assert upper.passed == (value <= bound)


def test_a_verdict_says_value_interval_bound_and_outcome() -> None:
    gate = Gate(score="section.macro_f1", at_least=0.9)
    (verdict,) = judge([gate], found({"section.macro_f1": 0.8996}))
    assert str(verdict) == "section.macro_f1 = 0.8996, wanted at least 0.9: failed"
    (verdict,) = judge([gate], found({"section.macro_f1": 0.8996}, section__macro_f1=SPREAD))
    assert str(verdict) == "section.macro_f1 = 0.8996 [0.805, 0.995], wanted at least 0.9: failed"


@given(st.lists(numbers, min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_an_interval_has_the_quantiles_of_numpy(values: list[float], confidence: float) -> None:
    wanted = np.quantile(np.array(values, dtype=np.float64), [(1 - confidence) / 2, (1 + confidence) / 2])
    assert interval(values, confidence) == pytest.approx(tuple(wanted), rel=1e-6, abs=1e-6 * max(1, *map(abs, values)))


def test_with_confidence_the_bound_has_to_hold_for_the_whole_interval() -> None:
    score = found({"a.b": 0.9}, a__b=SPREAD)  # 95%: 0.805 to 0.995; 50%: 0.85 to 0.95
    bounds: list[tuple[dict[str, Any], bool]] = [
        ({"at_least": 0.81}, True),
        ({"at_least": 0.81, "confidence": 0.5}, True),
        ({"at_least": 0.81, "confidence": 0.95}, False),
        ({"at_most": 0.99}, True),
        ({"at_most": 0.99, "confidence": 0.95}, False),
        ({"at_most": 0.996, "confidence": 0.95}, True),
    ]
    verdicts = judge([Gate(score="a.b", **bound) for bound, _ in bounds], score)
    assert [verdict.passed for verdict in verdicts] == [passed for _, passed in bounds]
    assert str(verdicts[2]) == "a.b = 0.9 [0.805, 0.995], wanted at least 0.81 with 95% confidence: failed"


def test_twenty_examples_may_pass_a_bound_that_they_fail_with_confidence() -> None:
    hits = np.array([1.0] * 17 + [0.0] * 3)
    (values,) = resample(20, lambda draws: {"accuracy": float(draws @ hits / 20)}).values()
    score = found({"a.accuracy": 0.85}, a__accuracy=" ".join(map(str, values)))
    bounds = [Gate(score="a.accuracy", at_least=0.75), Gate(score="a.accuracy", at_least=0.75, confidence=0.95)]
    assert [verdict.passed for verdict in judge(bounds, score)] == [True, False]
    assert interval(values, 0.95) == pytest.approx((0.70, 1.0), abs=0.051)  # by the binomial distribution


def test_confidence_without_examples_fails_and_says_so() -> None:
    (verdict,) = judge([Gate(score="a.b", at_least=0.5, confidence=0.95)], found({"a.b": 0.9}))
    assert verdict.passed is False and str(verdict).endswith("failed, since its examples were not kept")


def test_above_compares_with_another_evaluation_resample_by_resample() -> None:
    gate = Gate.model_validate({"score": "a.b", "at_most": 0.05, "above": "before", "confidence": 0.95})
    # The two scores vary together, so their difference hardly does, although each alone varies much more than the budget.
    higher = " ".join(f"{float(number) + 0.04:.4f}" for number in SPREAD.split())
    after, before = found({"a.b": 0.94}, a__b=higher), found({"a.b": 0.90}, a__b=SPREAD)
    (verdict,) = judge([gate], after, {"before": before})
    assert verdict.passed and verdict.interval == pytest.approx((0.04, 0.04))
    assert verdict.gate == "a.b at most 0.05 above before with 95% confidence"
    (verdict,) = judge([gate], found({"a.b": 0.96}, a__b=higher), {"before": before})
    assert verdict.passed is False


def test_a_gate_with_above_waits_for_the_other_scores_and_refuses_those_of_other_rows() -> None:
    gate = Gate.model_validate({"score": "a.b", "at_most": 0.05, "above": "before"})
    (verdict,) = judge([gate], found({"a.b": 1.0}))
    assert verdict.passed is None and str(verdict).endswith("wanted at most 0.05 above before: not judged yet")
    (verdict,) = judge([gate], found({"a.b": 1.0}), {"before": EvaluationResult({"a.b": 1.0}, {}, {"a": "others"})})
    assert verdict.passed is False and str(verdict).endswith("failed, since before scored other rows")


def test_scores_of_different_precision_are_not_compared() -> None:
    def scored(value: float, precision: str) -> EvaluationResult:
        task = {"rows": 1, "examples": "rows", "precision": precision}
        return EvaluationResult.of({"scores": {"a.b": value}, "tasks": {"a": task}})

    gate = Gate(score="a.b", at_most=0.05, above=Ref.to(Scores, "before"))
    (alike,) = judge([gate], scored(0.9, "bf16"), {"before": scored(0.9, "bf16")})
    (other,) = judge([gate], scored(0.9, "bf16"), {"before": scored(0.9, "fp32")})
    assert alike.passed
    assert not other.passed
    assert other.because == "since it was scored in bf16, and before in fp32; run one of them again with --force"


def test_a_score_that_is_not_a_number_passes_no_gate() -> None:
    nan = found({"a.b": float("nan")})
    assert not any(verdict.passed for verdict in judge([Gate(score="a.b", at_least=0), Gate(score="a.b", at_most=0)], nan))


def test_an_unknown_score_is_reported_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"'section.macro-f1'.*did you mean 'section.macro_f1'"):
        judge([Gate(score="section.macro-f1", at_least=0.9)], found({"section.macro_f1": 1.0, "text.perplexity": 3.0}))


def test_an_unknown_score_far_from_any_name_is_reported_with_all_names() -> None:
    with pytest.raises(RecipeError, match=r"there are section.macro_f1, text.perplexity"):
        judge([Gate(score="zzz", at_least=0.9)], found({"text.perplexity": 3.0, "section.macro_f1": 1.0}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of at_least and at_most"),
        ({"at_least": 0.5, "at_most": 0.9}, "exactly one of at_least and at_most"),
        ({"at_least": 0.5, "confidence": 95}, "less than 1"),
        ({"score": "train_gap", "at_most": 0.1, "confidence": 0.9}, "confidence: expected no value"),
    ],
)
def test_a_gate_without_meaning_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Gate.model_validate({"score": "a.b", **fields})


def test_the_train_gap_is_that_of_the_last_training_and_the_larger_of_two() -> None:
    inputs = {"base": [], "chat": ["base"], "law": ["chat"], "medicine": ["chat"], "merged": ["chat", "law", "medicine"]}
    losses = {"base": (1.0, 9.0), "chat": (1.0, 5.0), "law": (1.0, 1.2), "medicine": (1.0, 1.5)}
    records: dict[str, Any] = {
        name: {"metrics": {"trained_parameters": 1, "loss": loss, "validation_loss": held_out}}
        for name, (loss, held_out) in losses.items()
    }
    records["merged"] = {"metrics": {"adapters": 2}}
    assert train_gap("merged", Lineage(inputs, records)) == {"train_gap": 0.5}
    assert train_gap("chat", Lineage(inputs, records)) == {"train_gap": 4.0}
    del records["medicine"]["metrics"]["validation_loss"]
    assert train_gap("merged", Lineage(inputs, records)) == {"train_gap": pytest.approx(0.2)}
    (verdict,) = judge([Gate(score="train_gap", at_most=0.05)], found({}))
    assert verdict.passed is False and "no training of the model measured a loss on held-out rows" in str(verdict)


def test_gates_import_no_torch_and_no_hub() -> None:
    code = "import sys, runner.gates; assert not {'torch', 'numpy', 'huggingface_hub', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

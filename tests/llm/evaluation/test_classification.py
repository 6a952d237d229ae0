"""Scores of a classification by label and of how sure it is, against scikit-learn and cases by hand."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from llm.data.turn import Turn
from llm.evaluation.calibration import calibrate, calibration_error, probabilities
from llm.evaluation.classification import judged_labels
from llm.evaluation.scoring import Outcome, Question

LABELS = ["heart", "lung", "skin", "bone"]  # of which the last is never expected


def outcome(expected: list[int], scores: np.ndarray) -> Outcome:
    asked = [
        Question(f"a:{row}", [Turn("user", ("?",)), Turn("assistant", (LABELS[one],))]) for row, one in enumerate(expected)
    ]
    return judged_labels(LABELS, asked, scores, prompts=[f"row {row}" for row in range(len(expected))], facts={})


def test_scores_by_class_and_the_confusion_matrix_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(3)
    expected = draw.integers(0, 3, 200).tolist()
    scores = draw.normal(size=(200, 4)) + 1.5 * np.eye(4)[expected]
    found = outcome(expected, scores)
    chosen = scores.argmax(1)
    numbers = range(len(LABELS))
    by_class = precision_recall_fscore_support(expected, chosen, labels=numbers, zero_division=0)
    for place, one in enumerate(found.facts["classes"]):
        wanted = [column[place] for column in by_class]
        assert [one[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(wanted, abs=1e-4)
    assert found.facts["confusion"] == confusion_matrix(expected, chosen, labels=numbers).tolist()
    assert found.facts["classes"][3]["support"] == 0 and found.facts["classes"][3]["recall"] == 0


def test_the_surest_mistakes_come_first_and_the_calibration_error_is_that_by_hand() -> None:
    shares = np.array([[0.9, 0.1], [0.9, 0.1], [0.7, 0.3], [0.9, 0.1], [0.6, 0.4]])
    scores = np.concatenate([np.log(shares), np.full((5, 2), -1e3)], 1)
    found = outcome([0, 1, 1, 0, 0], scores)
    assert [(one["row"], one["probability"]) for one in found.examples] == [(2, 0.9), (3, 0.7)]
    # Of those at 0.9 two of three are right, at 0.7 none, at 0.6 all.
    by_hand = 3 / 5 * abs(0.9 - 2 / 3) + 1 / 5 * abs(0.7 - 0) + 1 / 5 * abs(0.6 - 1)
    assert found.scores["ece"] == pytest.approx(by_hand, rel=1e-4)
    assert calibration_error(shares, [0, 1, 1, 0, 0]) == pytest.approx(by_hand)
    assert len(found.replicates["ece"]) == 1000 and found.values["probability"] == pytest.approx(shares.max(1))


def test_a_temperature_is_kept_only_if_it_helps_on_rows_that_did_not_choose_it() -> None:
    draw = np.random.default_rng(1)
    true = draw.normal(size=(600, 4)) * 2
    expected = [int(draw.choice(4, p=share)) for share in probabilities(true)]
    too_sure = calibrate(3 * true, expected)
    assert too_sure.helps and 2.5 < too_sure.temperature < 3.5 and too_sure.after < too_sure.before / 2
    # Sure of everything that both halves get wrong by chance: what one half chooses hurts the other.
    halves = np.where(np.arange(40)[:, None] % 2 == 0, [[0.0, -1.0]], [[0.0, -0.2]])
    alike = calibrate(halves, [0, 1] * 20)
    assert not alike.helps and alike.temperature == 1.0 and alike.after >= alike.before
    assert calibrate(np.array([[0.0, -1.0]]), [0]).temperature == 1.0  # one row chooses nothing for itself


def test_rows_that_are_all_right_do_not_make_a_model_certain() -> None:
    for rows in (6, 40, 400):
        found = calibrate(np.array([[0.0, -8.0]] * rows), [0] * rows)
        sure = probabilities(np.array([[0.0, -8.0]]), found.temperature)[0, 0]
        assert sure <= 1 - 1 / (rows + 3) or found.temperature == 1.0

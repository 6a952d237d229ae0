"""Rows with several labels: how they are read, learned, chosen and scored."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from llm.data.chat_dataset import write_rows
from llm.data.chat_parts import Table
from llm.data.conversations import NONE, Template, labels_of
from llm.data.packing import PackedRows
from llm.data.turn import Turn
from llm.errors import InputError
from llm.evaluation.baseline import classify_without_model
from llm.evaluation.multi_label import best_threshold, chosen_labels, judged_label_sets
from llm.evaluation.scoring import Question
from llm.tokenizer.train_bpe import train_bpe

NAMES = ["heart", "lung", NONE, "skin"]


@pytest.mark.parametrize(
    ("value", "several", "wanted"),
    [
        (["a", 2, "a"], "list", ["a", "2"]),
        ('["a", "b"]', "list", ["a", "b"]),
        ("a; b;;a ", ";", ["a", "b"]),
        (None, ";", []),
        (["a"], ";", ["a"]),
        ([], "list", []),
    ],
)
def test_labels_are_a_list_or_separated_text(value: object, several: str, wanted: list[str]) -> None:
    assert labels_of({"labels": value}, "labels", several) == wanted


@pytest.mark.parametrize(
    ("value", "several", "told"),
    [
        ("a;b", "list", "expected a list of labels in 'labels', got a string"),
        ("[a", "list", "text that is no JSON"),
        ([["a"]], "list", "expected text or a number in 'labels', got a list"),
        ({"a": 1}, ";", "expected text or a number in 'labels', got an object"),
    ],
)
def test_what_is_no_list_of_labels_is_told(value: object, several: str, told: str) -> None:
    with pytest.raises(InputError, match=told.replace("[", r"\[")):
        labels_of({"labels": value}, "labels", several)


def test_the_labels_of_a_row_are_learned_together_as_much_as_one_label(tmp_path: Path) -> None:
    rows = [{"text": "x", "tags": ["aa", "bb"]}, {"text": "y", "tags": ["aa"]}, {"text": "z", "tags": []}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_bpe(["aa bb none"] * 3, 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)
    table = Table((file,), Template("{text}", "{tags}", several="list"))
    facts = write_rows(
        tmp_path / "rows", [table], tokenizer=tokenizer, context=32, report=lambda **_: None, should_stop=lambda: False
    )
    assert (facts["rows"], facts["chats"]) == (3, 4)
    found = PackedRows(tmp_path / "rows", seed=0)
    seen = {}
    for row in map(found.row, range(found.rows_per_epoch)):
        assert row.weights is not None
        for document in range(row.documents.max() + 1):
            inside = row.documents == document
            text = tokenizer.decode(row.tokens[inside].tolist())
            seen[text] = set(row.weights[inside & (row.targets >= 0)].tolist())
    assert sorted(seen.items()) == [("xaa", {0.5}), ("xbb", {0.5}), ("yaa", {1.0}), ("znone", {1.0})]


def test_chosen_are_the_likeliest_label_and_those_that_are_nearly_as_likely() -> None:
    shares = np.array([[0.5, 0.45, 0.0, 0.05], [0.3, 0.1, 0.6, 0.0], [0.4, 0.0, 0.35, 0.25]])
    assert chosen_labels(shares, 0.5, NAMES).astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]
    expected = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]], dtype=bool)
    assert 0.63 <= best_threshold(shares, expected, NAMES) <= 0.9


def test_scores_are_those_of_scikit_learn_without_the_label_for_none() -> None:
    draw = np.random.default_rng(5)
    sets = [tuple(np.array(NAMES)[[0, 1, 3]][draw.random(3) < 0.4]) or (NONE,) for _ in range(120)]
    expected = np.array([[name in one for name in NAMES] for one in sets])
    shares = draw.random((120, 4)) * 0.6 + expected
    shares /= shares.sum(1, keepdims=True)
    asked = [Question("a:1", [Turn("user", ("?",)), Turn("assistant", (one[0],))], one) for one in sets]
    found = judged_label_sets(NAMES, asked, shares, prompts=["?"] * 120, facts={}, threshold=0.6)
    y, chosen = expected[:, [0, 1, 3]], chosen_labels(shares, 0.6, NAMES)[:, [0, 1, 3]]
    assert found.scores == {
        "micro_f1": pytest.approx(f1_score(y, chosen, average="micro"), rel=1e-5),
        "macro_f1": pytest.approx(f1_score(y, chosen, average="macro"), rel=1e-5),
        "subset_accuracy": pytest.approx(accuracy_score(y, chosen), rel=1e-5),
    }
    assert [one["label"] for one in found.facts["classes"]] == ["heart", "lung", "skin"]
    assert [one["support"] for one in found.facts["classes"]] == y.sum(0).tolist()
    assert len(found.examples) == int((y != chosen).any(1).sum())
    without = judged_label_sets(NAMES, asked, shares, prompts=["?"] * 120, facts={})
    assert without.scores["micro_f1"] > 0.8 and 0 < without.facts["threshold"] < 1


def test_the_baseline_finds_several_labels_in_words() -> None:
    words = {"heart": "pulse", "lung": "cough", "skin": "rash"}
    draw = np.random.default_rng(2)

    def rows(count: int) -> list[tuple[list[Turn], tuple[str, ...]]]:
        found = []
        for _ in range(count):
            labels = tuple(name for name in words if draw.random() < 0.45)
            text = " ".join(["the", *(words[name] for name in labels), "today"])
            found.append(([Turn("user", (text,)), Turn("assistant", ((labels or (NONE,))[0],))], labels or (NONE,)))
        return found

    asked = [Question("a:1", turns, labels) for turns, labels in rows(60)]
    found = classify_without_model(rows(300), asked, several=True)
    assert found.scores["micro_f1"] > 0.95 and found.scores["subset_accuracy"] > 0.9
    assert NONE in found.facts["labels"]

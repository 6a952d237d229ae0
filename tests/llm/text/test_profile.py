"""What files of rows hold, against counts made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm.text.personal import PersonalData
from llm.text.profile import Profile, profile
from llm.text.profile.guess import Guess, guess


def rows(path: Path, found: list[Any]) -> Profile:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in found), encoding="utf-8")
    return profile([path])


def test_everything_in_the_rows_is_counted(tmp_path: Path) -> None:
    found = rows(
        tmp_path / "a.jsonl",
        [
            {"text": "Fever and pain.", "n": 1},
            {"text": "Fever and pain.", "n": 1},
            {"text": " ", "n": None},
            {"text": "发烧和疼痛", "n": 2.5, "tags": ["a"]},
            '{"text": NaN}',
            '{"n": ' + "9" * 5000 + "}",
            "no JSON",
        ],
    )
    assert (found.rows, found.duplicates) == (7, 1)
    text = found.fields["text"]
    assert (text.present, text.empty, text.null, text.lengths.as_json()) == (4, 1, 0, {"p50": 5, "p95": 15, "max": 15})
    assert found.fields["n"].values == {"1": 2, "2.5": 1}
    assert found.fields["n"].null == 1
    assert found.fields["tags"].types == {"a list": 1}
    assert dict(found.languages) == {"en": 2, "other": 1, "zh": 1}
    told = found.faults.as_json()
    assert sum(one["rows"] for one in told) == 3
    assert told[0]["first"] == f"{tmp_path / 'a.jsonl'}:5"
    json.dumps(found.as_json())


def test_what_cannot_be_read_at_all_does_not_hide_the_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "b.csv").write_bytes("text,label\nschöne Grüße aus Köln und Düsseldorf,gut\n".encode("cp1252"))
    found = profile([tmp_path / "a.parquet", tmp_path / "b.csv", tmp_path / "c.exe"])
    assert found.rows == 1
    assert [one["first"] for one in found.faults.as_json()] == [str(tmp_path / "a.parquet"), str(tmp_path / "c.exe")]
    assert list(found.encodings) == ["b.csv"]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to jo.doe+x@mail.example.org today", {"e-mail address"}),
        ("call +49 30 901820 or (212) 555-0123", {"telephone number"}),
        ("手机13812345678。", {"telephone number"}),
        ("电话 13812345678", {"telephone number"}),
        ("11010519491231002X", {"identity number"}),  # the example of GB 11643
        ("110105194912310021", set()),
        ("card 4111 1111 1111 1111", {"card number"}),
        ("card 4111 1111 1111 1112", set()),
        ("DE89 3704 0044 0532 0130 00", {"account number"}),
        ("SSN 219-09-9999", {"social security number"}),
        ("in 1999-2005 the price of 12,500.00 rose by 3.1% on 2024-05-17 at 10:30:00", set()),
        ("version 1.2.3, page 100-120, 2024/05/17, ISBN-less", set()),
    ],
)
def test_personal_data_is_found_by_its_check_digits(text: str, kinds: set[str]) -> None:
    found = PersonalData()
    found.add(text, "text", "a:1")
    assert set(found.counts) == kinds


REVIEWS = [{"id": n, "Review Text": f"a long enough review {n}", "Stars": n % 2 + 1} for n in range(20)]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (REVIEWS, Guess("labels", "Review Text", "Stars")),
        ([{"body": f"{n} words", "mood": "good" if n % 2 else "bad"} for n in range(12)], Guess("labels", "body", "mood")),
        ([{"question": f"why {n}", "answer": f"because {n}"} for n in range(9)], Guess("pairs", "question", "answer")),
        (
            [{"instruction": f"do {n}", "input": "x" * (n % 2), "output": f"done {n}"} for n in range(9)],
            Guess("pairs", "instruction", "output", "input"),
        ),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3, Guess("preferences", "prompt", "chosen")),
        ([{"messages": [{"role": "user", "content": "hi"}]}] * 3, Guess("chats", "messages")),
        ([{"title": "t", "abstract": f"some text {n}"} for n in range(5)], Guess("documents", "abstract")),
    ],
)
def test_the_kind_of_rows_is_guessed_by_their_fields(tmp_path: Path, data: list[Any], wanted: Guess) -> None:
    found = guess(rows(tmp_path / "a.jsonl", data))
    assert found is not None
    assert found == wanted


def test_lists_are_several_labels_and_the_guess_says_so(tmp_path: Path) -> None:
    found = guess(rows(tmp_path / "a.jsonl", [{"text": f"row {n}", "labels": ["a", "b"]} for n in range(6)]))
    assert found == Guess("labels", "text", "labels", why="'labels' holds lists: rows have several labels", several="list")

"""The data that the shipped recipes bring along: every row says where it is from, may be shipped, and is in one split only."""

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[3] / "recipes" / "data"
FILES = sorted(path.name for path in DATA.glob("*.jsonl.gz"))
ALLOWED = {
    "Apache-2.0",
    "BSD-3-Clause",
    "CC-BY-2.0-FR",
    "CC-BY-4.0",
    "CC0-1.0",
    "MIT",
    "PSF-2.0",
    "PostgreSQL",
    "WordNet-3.0",
    "public domain",
}
SPLITS = [
    (["section_train"], ["section_dev", "section_test"]),
    (["medical_qa_train"], ["medical_qa_dev", "medical_qa_test"]),
    (["medical_qa_zh_train"], ["medical_qa_zh_test"]),
    (["general_en-1", "general_en-2"], ["general_en_val"]),
    (["general_zh"], ["general_zh_val"]),
    (["medical_text_en-1", "medical_text_en-2"], ["medical_text_en_test"]),
]


@cache
def rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def contents(names: list[str]) -> Iterator[str]:
    for name in names:
        for row in rows(f"{name}.jsonl.gz"):
            yield json.dumps([value for key, value in row.items() if key not in ("source", "license", "label")])


@pytest.mark.parametrize("name", FILES)
def test_every_row_has_a_licence_that_allows_distribution(name: str) -> None:
    assert {row["license"] for row in rows(name)} <= ALLOWED


def test_every_source_is_credited() -> None:
    notice = (DATA / "NOTICE").read_text(encoding="utf-8")
    sources = {re.split(r"[/:]", row["source"])[0] for name in FILES for row in rows(name)}
    assert {source for source in sources if source not in notice} == set()


@pytest.mark.parametrize(("train", "held_out"), SPLITS, ids=lambda names: names[0])
def test_no_training_row_is_held_out(train: list[str], held_out: list[str]) -> None:
    assert set(contents(train)).isdisjoint(contents(held_out))


def test_the_section_files_have_eight_labels_each() -> None:
    labels = [{row["label"] for row in rows(f"section_{split}.jsonl.gz")} for split in ("train", "dev", "test")]
    assert [len(one) for one in labels] == [8, 8, 8]
    assert labels[0] == labels[1] == labels[2]
    assert len(rows("section_test.jsonl.gz")) == 833


@pytest.mark.parametrize("name", FILES)
def test_files_are_small_and_hold_no_timestamp(name: str) -> None:
    data = (DATA / name).read_bytes()
    assert len(data) < 2_900_000
    assert data[4:8] == bytes(4)  # the time in a gzip header

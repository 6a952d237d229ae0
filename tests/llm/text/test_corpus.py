"""Corpora from sources: the same result for any cores and shards, duplicates, weights, and errors."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm.errors import InputError, Interrupted
from llm.text.cleaning import Rules
from llm.text.corpus import build_corpus
from llm.text.executor import LocalProcesses
from llm.text.shards import CorpusConfig
from llm.text.sources import Source

ROOT = Path(__file__).parents[3]


class InOrder:
    """Another executor: no processes, and all shards in one list."""

    def map(self, function: Callable[[Any], Any], shards: Iterable[Any]) -> Iterator[Any]:
        return iter([function(shard) for shard in list(shards)])


def prose(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(2, 8))) for _ in range(words))


def build(folder: Path, sources: list[Source], *, cores: int = 1, shard_bytes: int = 4000, executor=None, **options: Any):
    """The counts, and the two files' documents."""
    config = options.pop("config", CorpusConfig())
    folder.mkdir(parents=True, exist_ok=True)
    counts = build_corpus(
        sources,
        config,
        train=folder / "train.jsonl",
        validation=folder / "validation.jsonl",
        scratch=folder,
        executor=executor or LocalProcesses(cores),
        shard_bytes=shard_bytes,
        report=options.get("report", lambda **values: None),
        should_stop=options.get("should_stop", lambda: False),
    )
    train, validation = (
        [json.loads(line) for line in (folder / name).read_text().split("\n")[:-1]]
        for name in ("train.jsonl", "validation.jsonl")
    )
    return counts, train, validation


def rows(name: str, texts: Iterable[str], **settings: Any) -> Source:
    fields = [{"text": text} for text in texts]
    return Source(name, rows=lambda: fields, place=f"{name}-rows", **settings)


def texts(documents: list[dict[str, Any]]) -> list[str]:
    return [document["text"] for document in documents]


def crowd() -> list[Source]:
    """Two sources with copies and near copies within and between them, in files so that processes can read them."""
    one = [prose(seed) for seed in range(120)]
    two = [prose(seed) for seed in range(100, 200)]
    near = [f"{prose(seed)} and so it ended" for seed in range(0, 200, 7)]
    return [rows("one", [*one, *one[:9], "short", "again\n" * 50]), rows("two", [*near, *two], weight=1.5)]


@pytest.mark.parametrize(("cores", "shard_bytes"), [(1, 1), (1, 10**9), (2, 1700)])
def test_the_result_depends_on_neither_cores_nor_shard_size(tmp_path: Path, cores: int, shard_bytes: int) -> None:
    wanted = build(tmp_path / "wanted", crowd(), executor=InOrder(), shard_bytes=9000, config=CorpusConfig(validation=0.1))
    found = build(tmp_path / "found", crowd(), cores=cores, shard_bytes=shard_bytes, config=CorpusConfig(validation=0.1))
    assert found == wanted
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


def test_of_copies_and_near_copies_the_first_in_source_order_stays(tmp_path: Path) -> None:
    sources = [rows("a", [prose(1), prose(2)]), rows("b", [prose(3), prose(2) + " yes", prose(1)])]
    counts, train, _ = build(tmp_path, sources, config=CorpusConfig(validation=0))
    assert texts(train) == [prose(1), prose(2), prose(3)]
    assert [document["source"] for document in train] == ["a", "a", "b"]
    assert counts["sources"]["b"]["dropped"] == {"exact_duplicate": 1, "near_duplicate": 1}


def test_chinese_near_copies_are_found(tmp_path: Path) -> None:
    draw = random.Random(3)
    text = "".join(chr(draw.randrange(0x4E00, 0x5E00)) for _ in range(200))
    _, train, _ = build(tmp_path, [rows("a", [text, f"{text[:100]}，{text[100:]}了。"])], config=CorpusConfig(validation=0))
    assert texts(train) == [text]


def test_near_copies_are_kept_without_a_similarity(tmp_path: Path) -> None:
    source = rows("a", [prose(1), prose(1) + " yes", prose(1)])
    _, train, _ = build(tmp_path, [source], config=CorpusConfig(validation=0, similarity=None))
    assert texts(train) == [prose(1), prose(1) + " yes"]


def test_copies_are_found_after_cleaning(tmp_path: Path) -> None:
    source = rows("a", ["un caf\u00e9 s'il vous pla\u00eet", " un cafe\u0301 s'il vous pla\u00eet\r\n"])
    counts, _, _ = build(tmp_path, [source], config=CorpusConfig(validation=0))
    assert counts["sources"]["a"]["dropped"] == {"exact_duplicate": 1}


def test_adding_a_document_moves_no_other(tmp_path: Path) -> None:
    documents = [prose(seed) for seed in range(400)]
    _, train, validation = build(tmp_path / "a", [rows("a", documents)], config=CorpusConfig(validation=0.2))
    assert 50 < len(validation) < 110  # of 400 at 0.2: within four standard deviations of 80
    more = [prose(1000), *documents, prose(1001)]
    _, new_train, new_validation = build(tmp_path / "b", [rows("a", more)], config=CorpusConfig(validation=0.2))
    assert set(texts(train)) <= set(texts(new_train))
    assert set(texts(validation)) <= set(texts(new_validation))


def test_a_smaller_share_of_validation_is_part_of_a_larger_one(tmp_path: Path) -> None:
    held_out = [
        set(texts(build(tmp_path / str(share), [rows("a", map(prose, range(300)))], config=CorpusConfig(validation=share))[2]))
        for share in (0.05, 0.2)
    ]
    assert held_out[0] < held_out[1]


@pytest.mark.parametrize(("weight", "low", "high"), [(0.25, 0.25, None), (1, 1, 1), (2.25, 2, 3), (3, 3, 3)])
def test_weight_is_the_passes_over_a_source(tmp_path: Path, weight: float, low: float, high: int | None) -> None:
    source = rows("a", map(prose, range(400)), weight=weight)
    counts, train, validation = build(tmp_path, [source], config=CorpusConfig(validation=0.1))
    assert counts["passes"] == sum(document["passes"] for document in train)
    assert counts["passes"] / (400 * 0.9) == pytest.approx(weight, rel=0.3)
    assert {document["passes"] for document in validation} == {1}
    if high is None:
        assert {document["passes"] for document in train} == {1}
        assert counts["sources"]["a"]["dropped"] == {"unselected": 400 - len(train) - len(validation)}
    else:
        assert {document["passes"] for document in train} == set(range(int(low), high + 1))


def test_a_larger_weight_keeps_what_a_smaller_one_kept(tmp_path: Path) -> None:
    kept = [
        set(texts(build(tmp_path / str(weight), [rows("a", map(prose, range(200)), weight=weight)])[1]))
        for weight in (0.3, 0.6)
    ]
    assert kept[0] < kept[1]


def test_documents_carry_their_source_and_their_language_if_it_is_known(tmp_path: Path) -> None:
    told = [{"text": prose(1), "language": "fr"}, {"text": prose(2)}]
    sources = [Source("a", rows=lambda: told, place="a", language="en"), rows("b", [prose(3)])]
    _, train, _ = build(tmp_path, sources, config=CorpusConfig(validation=0))
    assert [{key: value for key, value in document.items() if key != "text"} for document in train] == [
        {"source": "a", "passes": 1, "language": "fr"},
        {"source": "a", "passes": 1, "language": "en"},
        {"source": "b", "passes": 1},
    ]


def test_a_template_joins_fields_and_a_filter_chooses_rows(tmp_path: Path) -> None:
    found = [{"title": f"T{n}", "body": prose(n), "lang": lang} for n, lang in enumerate(["en", "zh", "en"])]
    source = Source("a", rows=lambda: found, place="a", text="{title}\n{body}", where={"lang": "en"})
    counts, train, _ = build(tmp_path, [source], config=CorpusConfig(validation=0))
    assert texts(train) == [f"T0\n{prose(0)}", f"T2\n{prose(2)}"]
    assert counts["sources"]["a"]["dropped"] == {"filtered": 1}


def test_counts_have_kept_and_dropped_documents_and_attributions(tmp_path: Path) -> None:
    found = [
        {"text": prose(1), "license": "CC0-1.0", "source": "books"},
        {"text": "é" + prose(2), "license": "CC0-1.0", "source": "web"},
        {"text": prose(3), "license": "MIT", "source": "web"},
        {"text": prose(1), "license": "dropped with its only document"},
        {"text": "too short"},
        {"text": prose(4, words=900)},
        {"text": "once more\n" * 30},
    ]
    rules = Rules(max_characters=4000)
    counts, _, _ = build(
        tmp_path, [Source("a", rows=lambda: found, place="a")], config=CorpusConfig(rules=rules, validation=0)
    )
    length = sum(len(row["text"]) for row in found[:3])
    assert counts["sources"]["a"] == {
        "read": 7,
        "kept": 3,
        "train": 3,
        "validation": 0,
        "characters": length,
        "bytes": length + 1,
        "passes": 3,
        "dropped": {"exact_duplicate": 1, "too_short": 1, "too_long": 1, "repetition": 1},
        "languages": {},
        "licenses": {"CC0-1.0": 2, "MIT": 1},
        "origins": {"books": 1, "web": 2},
        "bad_rows": [],
    }
    assert json.loads(json.dumps(counts)) == counts


def test_half_a_character_is_removed_from_text_and_attribution(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose(1) + " \ud83d", "language": "\ud83d", "license": "MIT"}))
    source = Source("a", files=(tmp_path / "a.jsonl",))
    counts, train, _ = build(tmp_path / "out", [source], config=CorpusConfig(validation=0))
    assert train == [{"text": prose(1), "source": "a", "passes": 1}]
    assert counts["sources"]["a"]["licenses"] == {"MIT": 1}


BAD_LINES = [
    (b'{"text": "no end', r"a\.jsonl:3: expected one JSON object per line, got a line that is not JSON"),
    (b'["a", "list"]', r"a\.jsonl:3: expected one JSON object per line, got a list"),
    (b'{"body": "x"}', r"a\.jsonl:3: expected the field 'text', got only 'body'"),
    (b'{"text": 7}', r"a\.jsonl:3: field 'text': expected a string, got 7"),
    (b'{"text": null}', r"a\.jsonl:3: field 'text': expected a string, got null"),
    (b'{"text": "\xff"}', r"a\.jsonl:3: expected UTF-8"),
    (b"[" * 100_000, r"a\.jsonl:3: expected one JSON object per line, got a line that is not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_row_is_an_error_with_its_line_or_is_skipped_and_counted(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": prose(seed)}).encode() for seed in range(3)]
    path.write_bytes(b"\n".join([good[0], good[1], line, good[2]]))
    source = Source("a", files=(path,))
    with pytest.raises(InputError, match=message):
        build(tmp_path / "fail", [source], config=CorpusConfig(validation=0))
    counts, train, _ = build(tmp_path / "skip", [source], config=CorpusConfig(validation=0, skip_bad_rows=True))
    assert texts(train) == [prose(0), prose(1), prose(2)]
    assert counts["sources"]["a"]["dropped"] == {"bad_row": 1}
    assert len(counts["sources"]["a"]["bad_rows"]) == 1


def test_the_first_bad_row_is_reported_whichever_process_finds_one_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{prose(seed)}"}}\n' if seed % 50 else "bad\n" for seed in range(1, 400)))
    with pytest.raises(InputError, match=r"a\.jsonl:50: expected one JSON object per line"):
        build(tmp_path / "out", [Source("a", files=(path,))], cores=2, shard_bytes=2000)


def test_an_empty_result_is_an_error_with_files_and_reasons(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text("x")
    files = tuple(sorted(tmp_path.glob("*.txt")))
    with pytest.raises(
        InputError, match=r"0\.txt, .*/4\.txt and 3 more: expected documents to train on, got none of 8 rows: too_short 8;"
    ):
        build(tmp_path / "c", [Source("f", files=files), rows("a", ["y"])])
    with pytest.raises(
        InputError, match=r"^a-rows: expected documents to train on, got none of 3 rows: too_short 2, repetition 1;"
    ):
        build(tmp_path / "a", [rows("a", ["x", "y", "ha " * 900])])
    with pytest.raises(InputError, match="got none of 0 rows: there are no rows"):
        build(tmp_path / "b", [rows("a", [])])


def test_an_interrupted_build_continues_from_its_finished_shards(tmp_path: Path) -> None:
    wanted = build(tmp_path / "wanted", crowd())
    reports: list[int] = []
    with pytest.raises(Interrupted):
        build(
            tmp_path / "found",
            crowd(),
            report=lambda **values: reports.append(values["done"]),
            should_stop=lambda: len(reports) == 3,
        )
    finished = {path: path.stat().st_ino for path in (tmp_path / "found" / "shards").iterdir()}
    assert len(finished) == 3
    assert build(tmp_path / "found", crowd()) == wanted
    assert {path: path.stat().st_ino for path in finished} == finished


def test_finished_shards_are_not_reused_for_other_rows_or_another_config(tmp_path: Path) -> None:
    build(tmp_path, [rows("a", map(prose, range(50)))])
    _, train, validation = build(tmp_path, [rows("a", map(prose, range(50, 100)))])
    assert set(texts(train) + texts(validation)) == {prose(seed) for seed in range(50, 100)}
    _, train, _ = build(tmp_path, [rows("b", map(prose, range(50, 100)), weight=2)], config=CorpusConfig(validation=0))
    assert {(document["source"], document["passes"]) for document in train} == {("b", 2)}
    assert len(train) == 50


BUILD_AND_WAIT = """
import sys
from pathlib import Path
from llm.text.corpus import build_corpus
from llm.text.executor import LocalProcesses
from llm.text.shards import CorpusConfig
from llm.text.sources import Source

def wait(**values):
    print("reported", flush=True)
    sys.stdin.read()

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    build_corpus([Source("a", files=(folder / "a.jsonl",))], CorpusConfig(), train=folder / "train.jsonl",
                 validation=folder / "validation.jsonl", scratch=folder, executor=LocalProcesses(2), shard_bytes=2000,
                 report=wait, should_stop=lambda: False)
"""


def test_a_killed_build_leaves_no_process_behind_and_runs_again_to_the_same_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": prose(seed)}) + "\n" for seed in range(100)))
    (tmp_path / "script.py").write_text(BUILD_AND_WAIT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"reported\n"
    process.kill()
    # The children hold the same pipe: its end is reached only when the last of them is gone.
    rest, _ = process.communicate(timeout=30)
    assert rest == b""
    (tmp_path / "shards" / "000099.123").mkdir()  # what a killed process was writing
    source = Source("a", files=(tmp_path / "a.jsonl",))
    assert build(tmp_path, [source], shard_bytes=2000) == build(tmp_path / "wanted", [source])


def _die(shard: int) -> int:
    if shard == 3:
        import os

        os._exit(9)
    return shard


def test_a_killed_worker_is_an_error_with_a_cure() -> None:
    with pytest.raises(ChildProcessError, match="killed"):
        list(LocalProcesses(2).map(_die, range(10)))


def test_results_are_in_the_order_of_the_shards_and_shards_are_read_as_needed() -> None:
    drawn: list[int] = []

    def shards() -> Iterator[int]:
        for number in range(30):
            drawn.append(number)
            yield number

    results = LocalProcesses(2).map(abs, shards())
    assert next(results) == 0
    assert len(drawn) <= 6
    assert list(results) == list(range(1, 30))

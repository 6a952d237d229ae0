import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llm.errors import InputError
from runner.artifacts import Corpus, digest_file
from runner.input_files import Located
from runner.stage import Context
from runner.stages.corpus import MakeCorpus

ROOT = Path(__file__).parents[3]
COMMIT = "c0ffee" + "0" * 34
SENTENCES = [f"Document {number} tells {number**3 % 1009} things about {number**5 % 7919} others." for number in range(60)]


def stage(folder: Path, **fields: Any) -> MakeCorpus:
    for source in fields["sources"]:
        if "files" in source:
            source["files"] = Located(source["files"], folder)
    return MakeCorpus.model_validate(fields)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_quality_language_and_personal_data_are_rules_of_a_corpus(
    tmp_path: Path, make_context: Callable[..., Context]
) -> None:
    prose = [
        f"{number} boats went to the river of stories that morning, and people have to be quiet with them.\n"
        f"Nobody knew why {number * 7919 % 1009} lamps were still burning along the shore of the old harbour.\n"
        f"They said that house {number**3 % 997} had to be sold, and the man of {number + 20} years went home with his sons.\n"
        f"Write to reader{number}@example.org if you know more.\nThen {number} letters came, and that was the end of it."
        for number in range(30)
    ]
    german = (
        "Am Morgen war der Fluss still, und niemand hatte geschlafen, weil der Regen die ganze Nacht an die Fenster schlug. "
        * 3
    )
    menu = "Home\nProducts and services\nTerms of use\nThe end of the page and of that."
    rows = [*prose, german, menu]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    made = stage(
        tmp_path,
        sources=[{"files": "a.jsonl"}],
        quality=["gopher", "c4", "fineweb"],
        languages=["en"],
        redact=["email"],
        similarity=1.0,
        validation=0.0,
        max_repeated_lines=1,
    )
    context = make_context()
    counts = made.run(context)["sources"]["source-1"]
    texts = [row["text"] for row in read(Corpus(context.work).train)]
    assert len(texts) == counts["kept"] == 30, counts["dropped"]
    assert all("Write to [e-mail address] if you know" in text for text in texts)
    assert sum(counts["dropped"].values()) == 2 and not any("fluss" in text.lower() or "Home" in text for text in texts)


def test_languages_alone_drop_what_is_in_others_and_unknown_codes_are_told(
    tmp_path: Path, make_context: Callable[..., Context]
) -> None:
    texts = [*SENTENCES, "永和九年岁在癸丑暮春之初会于会稽山阴之兰亭修禊事也群贤毕至少长咸集"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields: dict[str, Any] = {"near_duplicates": False}
    counts = stage(tmp_path, sources=[{"files": "a.jsonl"}], languages=["zh"], validation=0.0, **fields).run(make_context())
    assert (counts["kept"], counts["sources"]["source-1"]["dropped"]) == (1, {"language": 60})
    with pytest.raises(ValidationError, match="expected a code as in ISO 639-1"):
        stage(tmp_path, sources=[{"files": "a.jsonl"}], languages=["English"])
    with pytest.raises(InputError, match=r"languages: expected codes .* that the identifier knows.*, got 'xyz'"):
        stage(tmp_path, sources=[{"files": "a.jsonl"}], languages=["en", "xyz"]).run(make_context())


def test_a_source_that_is_mostly_near_duplicates_is_told(tmp_path: Path, make_context: Callable[..., Context]) -> None:
    template = " ".join(f"clause{number}" for number in range(200))
    texts = [*(f"{template} number {number}" for number in range(30)), *SENTENCES[:10]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    context = make_context()
    stage(tmp_path, sources=[{"name": "contracts", "files": "a.jsonl"}], validation=0.0).run(context)
    notes = [line.get("note", "") for line in context.report.lines]  # type: ignore[attr-defined]
    assert any(note.startswith("warning: contracts: 29 of 40 documents are near-duplicates") for note in notes), notes


def test_a_recipe_of_two_sources_becomes_a_corpus(tmp_path: Path, make_context: Callable[..., Context]) -> None:
    lines = "".join(json.dumps({"text": text, "license": "CC0-1.0"}) + "\n" for text in SENTENCES)
    (tmp_path / "en.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "zh.txt").write_text("永和九年岁在癸丑暮春之初会于会稽山阴之兰亭修禊事也")
    context = make_context()
    made = stage(
        tmp_path,
        sources=[{"files": "en.jsonl.gz", "weight": 2}, {"files": "zh.txt", "name": "zh", "language": "zh"}],
        validation=0.2,
    )
    metrics = made.run(context)
    corpus = Corpus(context.work)
    train, validation = read(corpus.train), read(corpus.validation)
    assert sorted(row["text"] for row in train + validation if row["source"] == "source-1") == sorted(SENTENCES)
    assert {row["passes"] for row in train if row["source"] == "source-1"} == {2}
    assert validation
    assert {row["passes"] for row in validation} == {1}
    assert [row["language"] for row in train + validation if row["source"] == "zh"] == ["zh"]
    assert metrics["sources"]["source-1"]["licenses"] == {"CC0-1.0": 60}
    assert metrics["sources"]["source-1"]["weight"] == 2
    assert {"done": 61, "total": None, "unit": "documents"} in context.report.lines  # type: ignore[attr-defined]
    assert json.loads(json.dumps(metrics)) == metrics


def test_the_names_of_files_are_not_in_the_corpus(tmp_path: Path, make_context: Callable[..., Context]) -> None:
    found = []
    for name in ["first.jsonl", "second.jsonl"]:
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
        context = make_context(name)
        stage(tmp_path, sources=[{"files": name}]).run(context)
        found.append(Corpus(context.work).train.read_bytes())
    assert found[0] == found[1]


def test_bytes_of_the_corpus_change_only_with_the_version_of_the_kind(
    tmp_path: Path, make_context: Callable[..., Context]
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*SENTENCES, *SENTENCES]))
    context = make_context()
    stage(tmp_path, sources=[{"files": "a.jsonl", "weight": 1.5}], validation=0.1).run(context)
    assert MakeCorpus.version == 2
    corpus = Corpus(context.work)
    assert digest_file(corpus.train) == "c9d7a0869eebbd7cabb35c936f6b79393e4f1c11aa5e3b60a2a4148e707d6392"
    assert digest_file(corpus.validation) == "384e4b040f75225ba0132f4bf67f9d707fb9aeffc1a371f25dda12616037bbef"


def test_every_threshold_of_the_recipe_is_applied(tmp_path: Path, make_context: Callable[..., Context]) -> None:
    documents = [
        "tiny text",  # too_short
        "a text that is longer than sixty characters, which is a lot, it seems to me",  # too_long
        "one line of two\none line of two",  # repetition, by lines
        "ab" * 24,  # repetition, by compression
        "one two three four five six seven eight nine",
        "one two three four five six seven eight nine ten",  # near_duplicate
        "nothing like the others at all, is it?",
    ]
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "not json"]))
    settings: dict[str, Any] = {
        "validation": 0,
        "min_characters": 10,
        "max_characters": 60,
        "max_repeated_lines": 0.4,
        "min_compressed": 0.4,
        "similarity": 0.7,
        "on_bad_row": "skip",
    }
    metrics = stage(tmp_path, sources=[{"files": "a.jsonl"}], **settings).run(make_context("all"))
    dropped = {"too_short": 1, "too_long": 1, "repetition": 2, "near_duplicate": 1, "bad_row": 1}
    assert metrics["sources"]["source-1"]["dropped"] == dropped
    changes: list[tuple[dict[str, Any], str]] = [
        ({"min_characters": 1}, "too_short"),
        ({"max_characters": 1000}, "too_long"),
        ({"max_repeated_lines": 1}, "repetition"),
        ({"min_compressed": 0}, "repetition"),
        ({"similarity": 1}, "near_duplicate"),
        ({"near_duplicates": False}, "near_duplicate"),
    ]
    for number, (change, reason) in enumerate(changes):
        changed = stage(tmp_path, sources=[{"files": "a.jsonl"}], **settings | change).run(make_context(str(number)))
        assert changed["sources"]["source-1"]["dropped"].get(reason, 0) == dropped[reason] - 1, change
    with pytest.raises(InputError, match=r"a\.jsonl:8: expected one JSON object per line"):
        stage(tmp_path, sources=[{"files": "a.jsonl"}], **settings | {"on_bad_row": "fail"}).run(make_context("fail"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "expected either files or hub"),
        ({"files": "a", "hub": "b/c"}, "expected either files or hub, got both"),
        ({"files": "a", "split": "test"}, "split: expected none beside files"),
        ({"files": "a", "weight": 0}, "greater than 0"),
        ({"files": "a", "wieght": 1}, "Extra inputs"),
        ({"files": "a", "text": "{title"}, "is not a template"),
    ],
)
def test_a_source_with_contradictory_fields_is_refused(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(tmp_path, sources=[source])


def test_two_sources_with_the_same_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a different name for each source, got 'x' twice"):
        stage(tmp_path, sources=[{"files": "a", "name": "x"}, {"files": "b", "name": "x"}])


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers about one dataset, `owner/tiny`, whose branch `main` stands at COMMIT."""

    protocol_version = "HTTP/1.1"
    data = "".join(json.dumps({"title": f"T{n}", "body": text}) + "\n" for n, text in enumerate(SENTENCES)).encode()
    requests: list[str]

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(path)
        if path.startswith("/api/datasets/owner/tiny/tree/"):
            self.answer(
                json.dumps([{"type": "file", "path": "train.jsonl", "size": len(self.data), "oid": "0" * 40}]).encode()
            )
        elif path in [f"/api/datasets/owner/tiny/revision/{revision}" for revision in ("main", COMMIT)]:
            self.answer(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}]}).encode())
        elif path == f"/datasets/owner/tiny/resolve/{COMMIT}/train.jsonl":
            self.answer(self.data)
        else:
            self.answer(b"{}", status=404, headers={"X-Error-Code": "EntryNotFound"})

    def answer(self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        wanted = self.headers.get("Range")
        headers = {"ETag": '"0"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", **(headers or {})}
        if wanted and status == 200:
            first, last = wanted.removeprefix("bytes=").split("-")
            headers["Content-Range"] = f"bytes {first}-{min(int(last), len(body) - 1)}/{len(body)}"
            body, status = body[int(first) : int(last) + 1], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub on this machine, and the paths that it was asked for."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"requests": requests}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


RUN_STAGE = """
import json, sys
from pathlib import Path
from runner.stage import Context, Parallel
from runner.stages.corpus import MakeCorpus

work = Path(sys.argv[1])
scratch = work / ".work"
scratch.mkdir(parents=True, exist_ok=True)
context = Context("text", work, scratch, {}, {}, "", Parallel(), 1, lambda **values: None, lambda: False)
print(json.dumps(MakeCorpus.model_validate(json.loads(sys.argv[2])).run(context)))
"""


def run_against(
    address: str, folder: Path, recipe: dict[str, Any], *, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the stage in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", RUN_STAGE, folder / "work", json.dumps(recipe)],
        env={"PYTHONPATH": str(ROOT), "HF_ENDPOINT": address, "HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def test_a_hub_dataset_is_streamed_at_the_commit_of_its_branch(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    address, requests = hub
    source = {"hub": "owner/tiny", "text": "{title}\n{body}", "limit": 40}
    done = run_against(address, tmp_path, {"sources": [source], "validation": 0})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sources"]["owner/tiny"]
    assert (found["hub"], found["revision"], found["commit"]) == ("owner/tiny", "main", COMMIT)
    train = read(tmp_path / "work" / "train.jsonl")
    assert [row["text"] for row in train] == [f"T{n}\n{SENTENCES[n]}" for n in range(40)]
    assert {row["source"] for row in train} == {"owner/tiny"}
    assert not [path for path in requests if "/resolve/main/" in path]


def test_a_local_folder_with_the_name_of_a_hub_dataset_is_not_read(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    private = tmp_path / "here" / "owner" / "tiny" / "train.jsonl"
    private.parent.mkdir(parents=True)
    private.write_text('{"title": "mine", "body": "private"}\n')
    done = run_against(hub[0], tmp_path, {"sources": [{"hub": "owner/tiny", "text": "{title}"}]}, cwd=tmp_path / "here")
    assert done.returncode != 0
    assert f"owner/tiny@{COMMIT[:8]}: expected files of this dataset on the Hub, got {private}" in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"hub": "owner/missing"}, "owner/missing: the Hub has no such dataset at revision 'main'"),
        ({"hub": "owner/tiny", "split": "tset"}, f"owner/tiny@{COMMIT[:8]}: split 'tset' cannot be read"),
        ({"hub": "owner/tiny"}, f"owner/tiny@{COMMIT[:8]}/train:1: expected the field 'text', got only 'title', 'body'"),
    ],
)
def test_faults_of_a_hub_source_are_reported(
    tmp_path: Path, hub: tuple[str, list[str]], source: dict[str, Any], message: str
) -> None:
    done = run_against(hub[0], tmp_path, {"sources": [source]})
    assert done.returncode == 1
    assert f"llm.errors.InputError: {message}" in done.stderr

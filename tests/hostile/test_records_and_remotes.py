"""Hostile records, caches and remotes: none ends in a traceback, writes outside, hangs, or takes much memory."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bounded import bounded
from small_recipe import Folder

from runner.artifacts import RECORD
from runner.cache.record import Record, digest_of
from runner.cache.remote import open_remote
from runner.cache.store import Store
from runner.cli import main
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("honest"))
    assert folder.run().returncode == 0
    return folder


@pytest.fixture
def victim(honest: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """The same recipe with an empty cache, in a folder in which nothing else is written."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    shutil.copytree(honest.root, tmp_path / "victim", ignore=shutil.ignore_patterns("cache"))
    folder = Folder(tmp_path / "victim")
    before = set(folder.root.rglob("*"))
    yield folder
    written = {path for path in folder.root.rglob("*") if not path.is_relative_to(folder.cache)}
    assert written == before
    assert not (tmp_path / "out").exists() and not (tmp_path / "escaped").exists()


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def with_file(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(data: dict[str, Any]) -> dict[str, Any]:
        files = {**data["files"], name: "0" * 64}
        return {**data, "files": files, "digest": digest_of(files)}

    return change


def with_value(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {**data, name: value}


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "file above": with_file("../../../escaped"),
    "file with an absolute path": with_file("/tmp/escaped"),
    "file with backslashes": with_file("..\\..\\escaped"),
    "file with a terminal escape": with_file("a\x1b[2Jb"),
    "file with half a character": with_file("a\ud800b"),
    "file with a long name": with_file("a" * 5000),
    "file in many folders": with_file("a/" * 5000 + "a"),
    "file that is a folder too": lambda data: with_file("a/b")(with_file("a")(data)),
    "file that is hidden": with_file(".work/job.json"),
    "file that is the record": with_file(RECORD),
    "files as a list": with_value("files", []),
    "files with numbers": with_value("files", {"a": 1}),
    "no files": lambda data: {name: value for name, value in data.items() if name != "files"},
    "metrics that are none": with_value("metrics", None),
    "metrics that are deep": with_value("metrics", {"a": nested(900)}),
    "metrics that are deeper than a parser": with_value("metrics", {"a": "DEEP"}),
    "a number that is too large": with_value("metrics", {"a": 10**4000}),
    "a time that is a number": with_value("finished", 5),
    "a time with a terminal escape": with_value("finished", "2026-01-01T00:00:00\x1b[2J"),
    "seconds that are none": with_value("seconds", float("nan")),
    "seconds that are text": with_value("seconds", "5"),
    "seconds below nothing": with_value("seconds", -1),
    "inputs that are a list": with_value("inputs", [1]),
    "inputs without digests": with_value("inputs", {"a": {}}),
    "hardware that is text": with_value("hardware", "x"),
    "versions that are deep": with_value("versions", {"a": {"b": 1}}),
    "curves that are text": with_value("curves", {"loss": "x"}),
    "sizes below nothing": with_value("sizes", {"tokenizer.json": -5}),
    "sizes beyond the disk": with_value("sizes", {"tokenizer.json": 2**60}),
    "a stage with a long name": with_value("stage", "a" * 100_000),
    "another kind": with_value("kind", "../../x"),
    "another key": with_value("key", "0" * 64),
    "another digest": with_value("digest", "0" * 64),
    "an identity of another": with_value("identity", {"fields": {}}),
    "attachments above": with_value("attachments", {"../../out": "0" * 64}),
}


def sealed(record: Record, change: str) -> bytes:
    data = CHANGES[change](dict(record.data))
    whole = json.dumps(data, indent=2)
    if '"DEEP"' not in whole:
        return Record(json.loads(json.dumps(data))).sealed if "\\ud800" not in whole else _sealed_text(whole)
    return _sealed_text(whole.replace('"DEEP"', "[" * 100_000 + "]" * 100_000))


def _sealed_text(whole: str) -> bytes:
    import hashlib

    body = whole.removeprefix("{\n").encode() + b"\n"
    return b'{\n  "seal": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body


def record_of(folder: Folder, kind: str) -> Record:
    plan = Plan(load_recipe(folder.recipe), Store(folder.cache))
    return next(entry.record for entry in plan if entry.record and entry.stage.kind == kind)


def remote_of(honest: Folder, place: Path) -> Path:
    remote = open_remote(str(place))
    for entry in Plan(load_recipe(honest.recipe), Store(honest.cache)):
        assert entry.record is not None and entry.path is not None
        remote.offer(entry.record, entry.path)
    return place


def call(folder: Folder, *words: str) -> int:
    return bounded(lambda: main([words[0], str(folder.recipe), "--cache", str(folder.cache), *words[1:]]))


@pytest.mark.parametrize("change", CHANGES)
def test_a_hostile_record_of_a_remote_is_refused_with_words_and_the_plan_goes_on(
    honest: Folder, victim: Folder, tmp_path: Path, change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    place, record = remote_of(honest, tmp_path / "remote"), record_of(honest, "tokenizer")
    (place / "records" / f"{record.key}.json").write_bytes(sealed(record, change))
    assert call(victim, "pull", "--remote", str(place)) == 3
    said = capfd.readouterr()
    assert "tokenizer: damaged there" in said.out and "\x1b" not in said.out + said.err
    assert call(victim, "plan") == 0
    assert victim.states() == {"corpus": "cached", "tokenizer": "run", "tokens": "waiting"}


# Of these a remote's record is refused: it has to be the record of a key, and its files have to fit on the disk.
OF_REMOTES = {"sizes beyond the disk", "an identity of another"}


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in OF_REMOTES])
@pytest.mark.parametrize("place", ["records", "stages"])
def test_a_hostile_record_in_a_cache_counts_as_missing(honest: Folder, victim: Folder, change: str, place: str) -> None:
    """As in a cache that came with a folder, or one that others can write to."""
    record = record_of(honest, "tokenizer")
    shutil.copytree(honest.cache, victim.cache)
    for path in (victim.cache / "records" / f"{record.key}.json", victim.cache / "stages" / record.name / RECORD):
        if place in path.parts:
            path.write_bytes(sealed(record, change))
        else:
            path.unlink()
    assert call(victim, "plan") == 0
    assert victim.states()["tokenizer"] == "run"
    for words in (["why", "tokenizer"], ["path", "tokens"]):
        assert call(victim, *words) in (0, 1)
    assert bounded(lambda: main(["verify", "--cache", str(victim.cache)])) in (0, 3)
    assert bounded(lambda: main(["gc", "--keep-size", "0", "--cache", str(victim.cache)])) == 0


def to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def to_folder(path: Path) -> None:
    path.mkdir()


def to_file_elsewhere(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def to_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**42)


def to_loop(path: Path) -> None:
    path.symlink_to(path.name)


OTHERS = [to_device, os.mkfifo, to_folder, to_file_elsewhere, to_sparse, to_loop]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("what", ["record", "content"])
def test_something_else_in_the_place_of_a_file_of_a_remote_is_damage(
    honest: Folder, victim: Folder, tmp_path: Path, other: Callable[[Path], None], what: str
) -> None:
    place, record = remote_of(honest, tmp_path / "remote"), record_of(honest, "tokenizer")
    path = place / "records" / f"{record.key}.json"
    if what == "content":
        path = place / record.name / record.seal / "tokenizer.json"
    path.unlink()
    other(path)
    assert call(victim, "pull", "--remote", str(place)) in (0, 3)
    assert call(victim, "plan") == 0
    assert victim.states()["tokenizer"] == "run"
    assert not list((victim.cache / "arriving").glob("*"))


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("place", ["records", "stages", "digests.json", "origins"])
def test_something_else_in_the_place_of_a_file_of_a_cache_is_survived(
    honest: Folder, victim: Folder, other: Callable[[Path], None], place: str
) -> None:
    shutil.copytree(honest.cache, victim.cache)
    record = record_of(honest, "tokenizer")
    own = victim.cache / "stages" / record.name / RECORD
    paths = {
        "records": victim.cache / "records" / f"{record.key}.json",
        "stages": own,
        "digests.json": victim.cache / "digests.json",
        "origins": victim.cache / "origins" / f"{record.key}.json",
    }
    path = paths[place]
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if place == "records":
        own.unlink()
    other(path)
    assert call(victim, "plan") == 0
    assert bounded(lambda: main(["gc", "--keep-size", "0", "--cache", str(victim.cache)])) == 0


def test_forged_results_beside_a_recipe_are_told_in_one_line_and_not_used(tmp_path: Path) -> None:
    stranger = Folder(tmp_path / "stranger")
    assert stranger.run().returncode == 0
    (stranger.root / "pyproject.toml").touch()
    assert stranger.cache == stranger.root / "cache"
    done = stranger.call("plan", str(stranger.recipe), STOCKPOT_CACHE="")
    assert (
        done.returncode == 2
        and "expected a cache that your runs made" in done.stderr
        and done.stderr.count("\n") == 1
        and not done.stdout
    )

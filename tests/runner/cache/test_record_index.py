"""The index of records: it says what the records say, is made again from them, and many processes may use it at once."""

import json
import os
from pathlib import Path

import pytest
from small_cache import finish, key_for
from small_recipe import Folder

from runner.cache.record import Record
from runner.cache.record_index import FILE
from runner.cache.store import Store
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe


def keys(root: Path, *kinds: str) -> set[str]:
    return {record.key for record in Store(root).records(kinds)}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The records that are read from now on."""
    found: list[Path] = []
    read = Record.read
    monkeypatch.setattr(Record, "read", lambda path: (read(path), found.append(path))[0])
    return found


def test_a_record_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    store = Store(tmp_path)
    made = {finish(store, kind, key_for(kind)).key for kind in ("merge", "pack", "lora")}
    assert keys(tmp_path, "merge", "pack", "lora") == made
    assert len(reads) == 3
    reads.clear()
    assert keys(tmp_path, "merge") == {key_for("merge")} and keys(tmp_path, "corpus") == set()
    assert not reads
    finish(store, "merge", key_for("another"))
    assert keys(tmp_path, "merge") == {key_for("merge"), key_for("another")}
    assert len(reads) == 1


def test_a_record_that_is_replaced_or_removed_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    finish(store, "merge", key_for("one"), finished="2026-01-01T00:00:00+00:00")
    finish(store, "merge", key_for("other"), finished="2026-01-02T00:00:00+00:00")
    assert [record.key for record in store.records(["merge"])] == [key_for("other"), key_for("one")], "the newest first"
    finish(store, "merge", key_for("one"), finished="2026-01-03T00:00:00+00:00")
    assert [record.data["finished"][8:10] for record in store.records(["merge"])] == ["03", "02"]
    store.forget(key_for("other"))
    assert keys(tmp_path, "merge") == {key_for("one")}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"merge", b"mergf"),
        lambda content: content.replace(b"\n", b""),
        lambda content: os.urandom(2000),
        lambda content: b"\n".join(line[:-5] for line in content.split(b"\n")),
        lambda content: content[:-30] + b"a b c d e\n" * 1000,
        lambda content: b"[" * 100_000,
    ],
)
def test_a_damaged_index_is_made_again_from_the_records(tmp_path: Path, damage: object, reads: list[Path]) -> None:
    store = Store(tmp_path)
    made = {finish(store, "merge", key_for(str(number))).key for number in range(5)}
    assert keys(tmp_path, "merge") == made
    (tmp_path / FILE).write_bytes(damage((tmp_path / FILE).read_bytes()))  # type: ignore[operator]
    assert keys(tmp_path, "merge") == made
    reads.clear()
    assert keys(tmp_path, "merge") == made
    assert not reads, "and is whole again"


@pytest.mark.parametrize("place", ["folder", "pipe", "nowhere"])
def test_something_else_in_its_place_is_survived(tmp_path: Path, place: str) -> None:
    store = Store(tmp_path)
    made = {finish(store, "merge", key_for(str(number))).key for number in range(3)}
    match place:
        case "folder":
            (tmp_path / FILE).mkdir()
        case "pipe":
            os.mkfifo(tmp_path / FILE)
        case "nowhere":
            (tmp_path / FILE).symlink_to(tmp_path / "none" / "here")
    assert keys(tmp_path, "merge") == made


def test_many_processes_write_records_and_the_index_at_once(tmp_path: Path) -> None:
    pids = []
    for process in range(5):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                store = Store(tmp_path)
                for number in range(12):
                    finish(store, "merge", key_for(f"{process}-{number}"))
                    mine = {key_for(f"{process}-{one}") for one in range(number + 1)}
                    assert mine <= {record.key for record in store.records(["merge"])}
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 5
    assert len(keys(tmp_path, "merge")) == 60


def test_the_index_stays_as_large_as_its_records(tmp_path: Path) -> None:
    store, sizes = Store(tmp_path), []
    for number in range(60):
        finish(store, "merge", key_for("same"), finished=f"2026-01-01T00:00:{number:02}+00:00")
        (record,) = store.records(["merge"])
        assert record.data["finished"].endswith(f"{number:02}+00:00")
        sizes.append((tmp_path / FILE).stat().st_size)
    assert max(sizes) < 8 * sizes[0]


def test_a_plan_of_new_stages_reads_no_record_but_those_of_its_keys(folder: Folder, reads: list[Path]) -> None:
    store = Store(folder.cache)
    changed = load_recipe(folder.recipe, ["stage.tokens.context=16"])
    reason = Plan(changed, store).entries["tokens"].reason
    assert reason == "context: 32 -> 16"
    reads.clear()
    assert Plan(changed, store).entries["tokens"].reason == reason
    assert len(reads) == 2, "of the corpus and the tokenizer"


def test_a_stage_says_why_it_runs_from_the_index_alone(folder: Folder) -> None:
    before = folder.states("--set", "stage.tokens.context=16")
    lines = (folder.cache / FILE).read_bytes().split(b"\n")
    assert sum(line.split(b" ", 4)[2] == b"pack" for line in lines if line) == 1
    facts = json.loads(next(line for line in lines if b" pack " in line).split(b" ", 4)[4])
    assert set(facts["metrics"]) <= {"tokens"} and facts["stage"] == "tokens"
    assert folder.states("--set", "stage.tokens.context=16") == before

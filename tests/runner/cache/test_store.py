"""The cache folder: a finished artifact is complete, a changed one is not used, and each key has one holder."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_cache import hold

from runner.artifacts import SCRATCH
from runner.cache.heartbeat import this_machine
from runner.cache.store import Store, Waiting
from runner.stages import stage_kinds

KEY = "0" * 64
FACTS = {"identity": {}, "inputs": {}, "metrics": {}, "finished": "2026-01-01T00:00:00+00:00", "seconds": 1.0}


@pytest.fixture
def stage() -> Any:
    return stage_kinds()["tokenizer"].model_validate({"corpus": "corpus", "vocab_size": 300})


def finish(store: Store, stage: Any, content: str = "{}") -> Path:
    work = store.work(stage, KEY)
    (work / SCRATCH).mkdir(parents=True)
    (work / SCRATCH / "half").write_text("x")
    (work / "tokenizer.json").write_text(content)
    store.finish(stage, KEY, FACTS)
    return store.folder(stage, KEY)


def test_finishing_moves_the_whole_folder_without_its_scratch(tmp_path: Path, stage: Any) -> None:
    store = Store(tmp_path)
    folder = finish(store, stage)
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "tokenizer.json"]
    assert not store.work(stage, KEY).exists()
    record = store.record(stage, KEY)
    assert record is not None
    assert list(record.files) == ["tokenizer.json"]


def test_the_digest_covers_content_and_not_the_record(tmp_path: Path, stage: Any) -> None:
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    finish(one, stage)
    work = other.work(stage, KEY)
    (work / SCRATCH).mkdir(parents=True)
    (work / "tokenizer.json").write_text("{}")
    (work / "metrics.jsonl").write_text("{}\n")
    other.finish(stage, KEY, FACTS | {"seconds": 5})
    records = [store.record(stage, KEY) for store in (one, other)]
    assert records[0] is not None and records[1] is not None
    assert records[0].digest == records[1].digest


def test_a_record_survives_without_its_artifact_and_an_artifact_without_its_record_copy(tmp_path: Path, stage: Any) -> None:
    store = Store(tmp_path)
    finish(store, stage)
    store.forget(KEY)
    record = store.record(stage, KEY)
    assert record is not None and store.has_artifact(record)
    store = Store(tmp_path / "other")
    finish(store, stage)
    assert store.set_aside(stage, KEY) is not None
    record = store.record(stage, KEY)
    assert record is not None and not store.has_artifact(record)


def test_an_edited_artifact_is_not_used(tmp_path: Path, stage: Any) -> None:
    store = Store(tmp_path)
    file = finish(store, stage) / "tokenizer.json"
    record = store.record(stage, KEY)
    assert record is not None and store.has_artifact(record)
    file.write_text("[]")
    assert not store.has_artifact(record)


def test_an_edit_that_keeps_size_and_time_of_modification_is_detected(tmp_path: Path, stage: Any) -> None:
    store = Store(tmp_path)
    file = finish(store, stage) / "tokenizer.json"
    past = time.time_ns() - 10**10
    os.utime(file, ns=(past, past))
    record = store.record(stage, KEY)
    assert record is not None and store.has_artifact(record)
    with file.open("r+") as opened:  # the same inode
        opened.write("[]")
    os.utime(file, ns=(past, past))
    assert not store.has_artifact(record)
    assert not store.has_artifact(record, reread=True)


def test_digests_are_remembered_across_runs_and_a_change_is_detected(tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_text("one")
    os.utime(file, (1, 1))
    store = Store(tmp_path / "cache")
    first = store.digests.of(file)
    store.digests.save()
    assert Store(tmp_path / "cache").digests.of(file) == first
    file.write_text("two")
    assert Store(tmp_path / "cache").digests.of(file) != first


def test_a_cache_that_cannot_be_written_does_not_stop_planning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "cache")
    os.utime(tmp_path / "file", (1, 1))
    store.digests.of(tmp_path / "file")
    store.digests.save()


class Recorded(Waiting):
    def __init__(self) -> None:
        self.holders: list[str] = []

    def started(self, holder: str) -> None:
        self.holders.append(holder)


def test_a_second_run_of_a_key_waits_and_learns_who_holds_it(tmp_path: Path, stage: Any) -> None:
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=hold, args=(tmp_path, stage, KEY, held, release))
    holder.start()
    assert held.wait(60)
    waiting = Recorded()
    waiting.tick = release.set  # type: ignore[method-assign]  # the first tick lets the holder go
    with Store(tmp_path).lock(stage, KEY, waiting=waiting):
        assert waiting.holders == [f"process {holder.pid} on {this_machine().host}"]
    holder.join()


def test_a_lock_is_held_as_long_as_a_child_that_inherited_its_file(tmp_path: Path, stage: Any) -> None:
    """A killed run leaves its lock to its workers until they end."""
    store = Store(tmp_path)
    with store.lock(stage, KEY, waiting=Waiting()) as log:
        worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log, stderr=log)

    class RefusedError(Exception):
        pass

    class Impatient(Waiting):
        def tick(self) -> None:
            raise RefusedError

    with pytest.raises(RefusedError), store.lock(stage, KEY, waiting=Impatient()):
        pass
    worker.communicate(b"\n")
    with store.lock(stage, KEY, waiting=Impatient()):
        pass

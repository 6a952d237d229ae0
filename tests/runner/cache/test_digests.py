"""The memo of digests: an edit is noticed, however it was made, and what was not edited is not read again."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from small_cache import unnoticed
from small_recipe import ALL_CACHED, Folder

from runner.artifacts import digest_file
from runner.cache import digests
from runner.cache.digests import DigestMemo
from runner.cli import main


@pytest.fixture(autouse=True)
def old_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what was just written is remembered."""
    monkeypatch.setattr(digests, "FRESH_SECONDS", -1.0)


def remembered(memo: Path, path: Path) -> str:
    """The digest of a file, which is remembered now."""
    known = DigestMemo(memo)
    found = known.of(path)
    known.save()
    assert str(path) in json.loads(memo.read_text())
    return found


def edited_by_utime(path: Path, other: Path) -> None:
    status = path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edited_by_cp(path: Path, other: Path) -> None:
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    subprocess.run(["cp", "-p", str(other), str(path)], check=True)


def edited_by_copy2(path: Path, other: Path) -> None:
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    shutil.copy2(other, path)


def edited_by_rename(path: Path, other: Path) -> None:  # as `rsync -t` does
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("edit", [edited_by_utime, edited_by_cp, edited_by_copy2, edited_by_rename])
def test_an_edit_that_keeps_size_and_time_of_modification_is_noticed(tmp_path: Path, edit: object) -> None:
    path, other, memo = tmp_path / "data", tmp_path / "other", tmp_path / "digests.json"
    path.write_text("one\n")
    other.write_text("two\n")
    before = remembered(memo, path)
    stamp = path.stat().st_size, path.stat().st_mtime_ns
    edit(path, other)  # type: ignore[operator]
    assert (path.stat().st_size, path.stat().st_mtime_ns) == stamp
    assert DigestMemo(memo).of(path) == digest_file(path) != before


def test_a_stage_runs_again_after_its_data_was_replaced_by_cp_with_the_times_of_the_old(folder: Folder) -> None:
    data = folder.root / "text.jsonl"
    assert folder.states() == ALL_CACHED
    changed = folder.root / "changed"
    changed.write_text(data.read_text().replace("kidney", "lizard"))
    edited_by_cp(data, changed)
    assert folder.states()["corpus"] == "run"


def test_check_inputs_finds_an_edit_that_the_memo_cannot_see(folder: Folder) -> None:
    """As after a disk error, or by a file system that does not keep the time of a change: the memo is told the new times."""
    assert folder.states() == ALL_CACHED
    data = folder.root / "text.jsonl"
    unnoticed(folder.cache, data, lambda path: path.write_text(path.read_text().replace("kidney", "lizard")))
    assert folder.states() == ALL_CACHED
    assert folder.states("--check-inputs")["corpus"] == "run"
    assert folder.states()["corpus"] == "run", "what was found is remembered"


@pytest.mark.parametrize(
    "damage", ["", "[]", "{", '{"PATH": 1}', '{"PATH": []}', '{"PATH": [1, 2, 3, "x"]}', "[" * 100_000, "\udcff"]
)
def test_a_damaged_memo_is_made_again(tmp_path: Path, damage: str) -> None:
    path, memo = tmp_path / "data", tmp_path / "digests.json"
    path.write_text("one\n")
    memo.write_text(damage.replace("PATH", str(path)), errors="surrogateescape")
    assert remembered(memo, path) == digest_file(path)


def test_check_inputs_keeps_what_is_remembered_of_other_files(tmp_path: Path) -> None:
    one, other, memo = tmp_path / "one", tmp_path / "other", tmp_path / "digests.json"
    one.write_text("one\n")
    other.write_text("two\n")
    remembered(memo, one)
    again = DigestMemo(memo)
    again.rereads = True
    again.of(other)
    again.save()
    assert {str(one), str(other)} <= json.loads(memo.read_text()).keys()


def test_the_command_run_takes_the_option(folder: Folder) -> None:
    assert main(["run", str(folder.recipe), "--cache", str(folder.cache), "--check-inputs"]) == 0

"""`run verify`: damaged files are named and set aside; intact ones stay."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_cache import FILES, finish, flip, key_for, small_cache

from runner.artifacts import METRICS, RECORD
from runner.cache.ownership import cache_of
from runner.cache.record import DamagedRecordError, Record
from runner.cache.store import Store, Waiting
from runner.cli import main
from runner.errors import IntegrityError
from runner.stages import stage_kinds

KINDS = sorted(stage_kinds())


def verify(store: Store, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["verify", "--cache", str(store.root)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_an_intact_cache_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = verify(small_cache(tmp_path), capsys)
    assert code == 0
    assert f"{len(KINDS)} artifacts and {len(KINDS)} records, all as recorded" in output


def test_a_missing_cache_verifies_and_is_not_created(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(Store(tmp_path / "none"), capsys)[0] == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_in_any_file_of_any_kind_is_detected_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    store = Store(tmp_path)
    finish(store, kind, key_for(kind))
    folder, kept = store.folder(kind, key_for(kind)), tmp_path / "kept"
    shutil.copytree(folder, kept)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert set(names) == {*FILES[stage_kinds()[kind].makes], METRICS, RECORD}
    choose = random.Random(kind)
    for name in names:
        for _ in range(3):
            flip(folder / name, choose.randrange((folder / name).stat().st_size * 8))
            record = store.record(kind, key_for(kind))
            assert record is not None
            assert store.has_artifact(record, reread=True) == (name in (METRICS, RECORD)), "a run would use it"
            code, output = verify(store, capsys)
            assert code == IntegrityError.exit_code
            assert f"{folder.name}: {name}: expected " in output and ", got " in output
            assert verify(store, capsys)[0] == 0, "damaged files are set aside"
            if name == RECORD:
                assert (folder / RECORD).read_bytes() == (kept / RECORD).read_bytes(), "restored from its copy"
            elif name == METRICS:
                assert store.has_artifact(record, reread=True), "no stage reads metrics"
                shutil.copy2(kept / METRICS, folder / METRICS)
            else:
                assert not folder.exists()
                shutil.copytree(kept, folder)


def test_every_flipped_bit_of_a_record_is_detected(tmp_path: Path) -> None:
    sealed = finish(Store(tmp_path), "tokenizer", key_for("tokenizer")).sealed
    assert Record.unsealed(sealed).sealed == sealed
    for bit in range(len(sealed) * 8):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedRecordError):
            Record.unsealed(bytes(changed))


def test_a_record_with_both_copies_damaged_counts_as_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = small_cache(tmp_path)
    flip(store.folder("corpus", key_for("corpus")) / RECORD, 999)
    flip(store.record_path(key_for("corpus")), 998)
    assert store.record("corpus", key_for("corpus")) is None
    code, output = verify(store, capsys)
    assert code == IntegrityError.exit_code
    assert f"corpus-{key_for('corpus')}: record.json: expected" in output
    assert f"records/{key_for('corpus')}.json: expected" in output
    assert not store.folder("corpus", key_for("corpus")).exists()
    assert verify(store, capsys)[0] == 0


def test_a_damaged_copy_of_a_record_is_rewritten_from_the_artifacts_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = small_cache(tmp_path)
    copy = store.record_path(key_for("lora"))
    before = copy.read_bytes()
    flip(copy, 5)
    assert verify(store, capsys)[0] == IntegrityError.exit_code
    assert copy.read_bytes() == before


def test_a_record_under_the_key_of_another_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = small_cache(tmp_path)
    shutil.copy(store.record_path(key_for("sft")), store.record_path(key_for("other")))
    assert store.record("sft", key_for("other")) is None
    assert "expected the record of this key, got that of" in verify(store, capsys)[1]
    assert not store.record_path(key_for("other")).exists()


def damage(folder: Path, how: str) -> str:
    """Damages a tokenizer; returns the expected message."""
    match how:
        case "missing":
            (folder / "tokenizer.json").unlink()
            return "tokenizer.json: expected sha256"
        case "extra":
            (folder / "added_tokens.json").write_text("{}")
            return "added_tokens.json: expected nothing, got a file"
        case "extra folder":
            (folder / "more").mkdir()
            (folder / "more" / "x").touch()
            return "more/x: expected nothing, got a file"
        case "link":
            target = folder.parents[1] / "moved"
            (folder / "tokenizer.json").rename(target)
            (folder / "tokenizer.json").symlink_to(target)
            return "got a link"
        case "link to a folder":
            (folder / "all").symlink_to("/")
            return "all: expected nothing, got a link"
        case "a folder":
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer.json").mkdir()
            return "tokenizer.json: expected sha256"
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["missing", "extra", "extra folder", "link", "link to a folder", "a folder"])
def test_missing_and_extra_files_are_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    store = small_cache(tmp_path)
    folder = store.folder("tokenizer", key_for("tokenizer"))
    message = damage(folder, how)
    record = store.record("tokenizer", key_for("tokenizer"))
    assert record is not None and not store.has_artifact(record, reread=True)
    code, output = verify(store, capsys)
    assert code == IntegrityError.exit_code
    assert message in output
    assert not folder.exists()
    (aside,) = (tmp_path / "aside").iterdir()
    assert aside.name.startswith(folder.name)
    assert len(list((tmp_path / "stages").glob("*-*"))) == len(KINDS) - 1


def test_hidden_files_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = small_cache(tmp_path)
    (store.folder("merge", key_for("merge")) / ".DS_Store").touch()
    assert verify(store, capsys)[0] == 0


def test_a_damaged_artifact_in_use_is_reported_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = small_cache(tmp_path)
    folder = store.folder("pretrain", key_for("pretrain"))
    flip(folder / "model.safetensors", 77)
    record = store.record("pretrain", key_for("pretrain"))
    assert record is not None
    with store.reading([record], waiting=Waiting()):  # as a stage that reads it
        code, output = verify(store, capsys)
        assert code == IntegrityError.exit_code
        assert "model.safetensors: expected" in output and "in use" in output
        assert folder.exists()
    assert verify(store, capsys)[0] == IntegrityError.exit_code
    assert not folder.exists()


def test_verify_finds_the_cache_of_a_recipe_and_refuses_a_missing_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STOCKPOT_CACHE", raising=False)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "recipe.toml").write_text("name = 'x'\n")
    store = small_cache(cache_of(tmp_path / "recipe.toml", None))
    flip(store.folder("merge", key_for("merge")) / "config.json", 3)
    assert main(["verify", str(tmp_path / "recipe.toml")]) == IntegrityError.exit_code
    assert main(["verify", str(tmp_path / "none.toml")]) == 2
    capsys.readouterr()


def test_a_record_edited_by_hand_is_not_used(tmp_path: Path) -> None:
    store = small_cache(tmp_path)
    for path in (store.folder("evaluate", key_for("evaluate")) / RECORD, store.record_path(key_for("evaluate"))):
        record: dict[str, Any] = json.loads(path.read_text())
        record["metrics"]["loss"] = 0
        path.write_text(json.dumps(record, indent=2))
    assert store.record("evaluate", key_for("evaluate")) is None
    assert store.has_damaged_record("evaluate", key_for("evaluate"))


def test_all_damaged_artifacts_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = small_cache(tmp_path)
    for kind in KINDS:
        folder = store.folder(kind, key_for(kind))
        flip(folder / FILES[stage_kinds()[kind].makes][0], 8)
    code, output = verify(store, capsys)
    assert code == IntegrityError.exit_code
    assert f"{len(KINDS)} files are damaged" in output
    assert list((tmp_path / "stages").iterdir()) == []

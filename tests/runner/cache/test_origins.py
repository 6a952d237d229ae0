"""Where results came from: those of a remote count only if the user named it, and never replace what is known here."""

import contextlib
import json
import os
import pty
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from small_cache import finish, flip, key_for
from small_recipe import ALL_CACHED, Folder

from runner.artifacts import METRICS, Scores, Tokenizer
from runner.cache.origins import Origins, trust, trusted_file, trusted_remotes
from runner.cache.record import Record, digest_of
from runner.cache.remote import DamagedRemoteError, Mirror, full_address, open_remote
from runner.cache.store import Store, Waiting
from runner.cli import main
from runner.errors import RemoteError
from runner.graph import key_of
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe


@pytest.fixture(autouse=True)
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user who has trusted nothing yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def records(folder: Folder) -> list[Record]:
    return [record for entry in Plan(load_recipe(folder.recipe), Store(folder.cache)) if (record := entry.record)]


def forged_remote(folder: Folder, place: Path) -> Path:
    """A remote that has another tokenizer under the key of the true one; its records and files agree with each other."""
    store = Store(folder.cache)
    for record in records(folder):
        data, made = dict(record.data), place / record.name
        shutil.copytree(store.folder(record.kind, record.key), made / "files")
        if record.kind == "tokenizer":
            (made / "files" / "forged.txt").write_text("forged")
            data["files"] = Tokenizer(made / "files").digests()
            data |= {"digest": digest_of(data["files"]), "sizes": {}}
        forged = Record(data)
        (made / "files").rename(made / forged.seal)
        (made / forged.seal / "record.json").unlink()
        (place / "records").mkdir(exist_ok=True)
        (place / "records" / f"{record.key}.json").write_bytes(forged.sealed)
    return place


def strangers(finished: Folder, tmp_path: Path) -> Folder:
    """A stranger's recipe with its remote beside it, and the empty cache of a user."""
    shutil.copytree(finished.root, tmp_path / "strange", ignore=shutil.ignore_patterns("cache"))
    strange = Folder(tmp_path / "strange")
    strange.write(strange.recipe.read_text() + '\n[cache]\nremote = "mirror"\n')
    forged_remote(finished, strange.root / "mirror")
    return strange


def test_the_remote_that_a_recipe_names_is_not_used_until_the_user_agrees(finished: Folder, tmp_path: Path) -> None:
    strange = strangers(finished, tmp_path)
    done = strange.run()
    assert done.returncode == 0, done.stderr
    assert "names the remote cache" in done.stderr and "--trust-remote" in done.stderr
    assert "fetched" not in done.stderr and "uploaded" not in done.stderr
    assert strange.digest("tokenizer") == finished.digest("tokenizer")
    assert not (strange.cache / "origins").exists()


def test_what_came_from_a_remote_counts_no_more_once_the_user_does_not_name_it(
    finished: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = strangers(finished, tmp_path)
    done = strange.run("--trust-remote")
    assert done.returncode == 0, done.stderr
    assert f"count from now on ({trusted_file()})" in done.stderr and "fetched from the remote" in done.stderr
    assert strange.digest("tokenizer") != finished.digest("tokenizer"), "the user agreed to it"
    assert strange.run().returncode == 0, "once is enough"
    assert main(["verify", "--cache", str(strange.cache)]) == 0
    address = full_address(str(strange.root / "mirror"))
    assert f"2 records from {address}" in capsys.readouterr().out
    trusted_file().unlink()
    assert strange.states()["corpus"] == "run"
    assert main(["verify", "--cache", str(strange.cache)]) == 0
    assert "not used, since you did not name it" in capsys.readouterr().out
    done = strange.run()
    assert done.returncode == 0, done.stderr
    assert strange.digest("tokenizer") == finished.digest("tokenizer")
    assert strange.states() == ALL_CACHED
    assert main(["verify", "--cache", str(strange.cache)]) == 0
    assert "3 records made here" in (output := capsys.readouterr().out) or "4 records made here" in output


def test_a_remote_that_the_environment_names_counts_while_it_does(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["push", str(folder.recipe), "--cache", str(folder.cache), "--remote", str(tmp_path / "team")]) == 0
    trusted_file().unlink()
    shutil.rmtree(folder.cache)
    monkeypatch.setenv("STOCKPOT_REMOTE", str(tmp_path / "team"))
    assert main(["pull", str(folder.recipe), "--cache", str(folder.cache)]) == 0
    assert folder.states() == ALL_CACHED
    monkeypatch.delenv("STOCKPOT_REMOTE")
    assert folder.states()["corpus"] == "run"
    assert not trusted_remotes()


def test_an_option_names_a_remote_for_later_commands_too(folder: Folder, tmp_path: Path) -> None:
    team = str(tmp_path / "team")
    assert main(["push", str(folder.recipe), "--cache", str(folder.cache), "--remote", team]) == 0
    shutil.rmtree(folder.cache)
    assert main(["pull", str(folder.recipe), "--cache", str(folder.cache), "--remote", team]) == 0
    assert folder.states() == ALL_CACHED
    assert trusted_remotes() == {full_address(team)}


def test_a_result_that_is_known_here_is_fetched_only_with_its_content(folder: Folder, tmp_path: Path) -> None:
    remote = open_remote(str(forged_remote(folder, tmp_path / "remote")))
    store, (corpus, tokenizer, _) = Store(folder.cache), records(folder)
    for record in (corpus, tokenizer):
        shutil.rmtree(store.folder(record.kind, record.key))
    forged = remote.record("tokenizer", tokenizer.key)
    assert forged is not None and forged.digest != tokenizer.digest
    with pytest.raises(DamagedRemoteError, match="expected the content that is known here"):
        remote.fetch(forged, store, known=tokenizer)
    done = folder.run("--remote", str(tmp_path / "remote"), "--set", "stage.tokens.context=16")
    assert done.returncode == 0, done.stderr
    assert "tokenizer  done in" in done.stderr and "corpus  fetched from the remote" in done.stderr
    assert records(folder)[0].seal == corpus.seal
    assert folder.digest("tokenizer") == tokenizer.digest
    mended = remote.record("tokenizer", tokenizer.key)
    assert mended is not None and mended.digest == tokenizer.digest, "what is damaged there is replaced"


def test_scores_of_a_remote_never_replace_those_that_were_measured_here(tmp_path: Path) -> None:
    """The same content under a record with better scores: the record that is known here stays."""
    store, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    mine = finish(store, "evaluate", key_for("scores"))
    theirs = finish(there, "evaluate", key_for("scores"))
    better = Record({**theirs.data, "metrics": {**theirs.data["metrics"], "scores": {"a.b": 1.0}}})
    remote = open_remote(str(tmp_path / "remote"))
    remote._upload(
        {
            remote._path(better, name): Scores(there.folder("evaluate", mine.key)).folder / name
            for name in better.files | better.attachments
        },
        better,
    )
    shutil.rmtree(store.folder("evaluate", mine.key))
    with store.lock("evaluate", mine.key, waiting=Waiting()):
        remote.fetch(better, store, known=mine)
    assert store.record("evaluate", mine.key) == mine
    assert store.has_artifact(mine, reread=True)
    assert store.origins.of(mine) is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "record"])
def test_a_damaged_artifact_in_a_remote_is_told_and_replaced(folder: Folder, tmp_path: Path, damage: str) -> None:
    team, tokenizer = tmp_path / "team", records(folder)[1]
    options = ["--cache", str(folder.cache), "--remote", str(team)]
    assert main(["push", str(folder.recipe), *options]) == 0
    (file,) = team.glob("tokenizer-*/*/tokenizer.json")
    match damage:
        case "flipped":
            flip(file, 1000)
        case "cut":
            file.write_bytes(file.read_bytes()[:-10])
        case "missing":
            file.unlink()
        case "record":
            flip(team / "records" / f"{tokenizer.key}.json", 2000)
    shutil.copytree(folder.root, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("cache"))
    there = Folder(tmp_path / "elsewhere")
    assert main(["pull", str(there.recipe), "--cache", str(there.cache), "--remote", str(team)]) == RemoteError.exit_code
    done = there.run("--remote", str(team), "--set", "stage.tokens.context=16")
    assert done.returncode == 0, done.stderr
    assert "warning: " in done.stderr and "made here instead, and replaced there" in done.stderr
    third = Store(tmp_path / "third")
    mended = open_remote(str(team)).record("tokenizer", tokenizer.key)
    assert mended is not None
    with third.lock("tokenizer", tokenizer.key, waiting=Waiting()):
        open_remote(str(team)).fetch(mended, third)
    assert third.has_artifact(mended, reread=True)


@pytest.mark.parametrize("damage", ["cut", "missing", "record"])
def test_push_replaces_what_is_damaged_in_the_remote(folder: Folder, tmp_path: Path, damage: str) -> None:
    team, tokenizer = tmp_path / "team", records(folder)[1]
    options = ["--cache", str(folder.cache), "--remote", str(team)]
    assert main(["push", str(folder.recipe), *options]) == 0
    (file,) = team.glob("tokenizer-*/*/tokenizer.json")
    match damage:
        case "cut":
            file.write_bytes(b"")
        case "missing":
            file.unlink()
        case "record":
            (team / "records" / f"{tokenizer.key}.json").write_bytes(b"{}")
    assert main(["push", str(folder.recipe), *options]) == 0
    with (store := Store(tmp_path / "other")).lock("tokenizer", tokenizer.key, waiting=Waiting()):
        open_remote(str(team)).fetch(tokenizer, store)
    assert store.has_artifact(tokenizer, reread=True)


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"{}", b"[" * 10_000, b'{"seal": 1}', b"\xff"])
def test_a_record_with_a_damaged_note_of_its_origin_does_not_count(tmp_path: Path, note: bytes) -> None:
    store = Store(tmp_path)
    record = finish(store, "merge", key_for("noted"))
    assert store.record("merge", record.key) == record
    store.remember(record, origin="s3://somewhere")
    assert store.record("merge", record.key) is None
    (tmp_path / "origins" / f"{record.key}.json").write_bytes(note)
    assert store.record("merge", record.key) is None


@pytest.mark.parametrize("text", ["", "trusted = 1", "trusted = [1]", "[", "\udcff", 'trusted = "s3://x"'])
def test_a_damaged_list_of_trusted_remotes_trusts_none_and_can_be_written_again(text: str) -> None:
    trusted_file().parent.mkdir(parents=True)
    trusted_file().write_text(text, errors="surrogateescape")
    assert trusted_remotes() == set()
    assert not Origins(Path()).counts("s3://x")
    assert trust("s3://x") == trusted_file()
    assert Origins(Path()).counts("s3://x") and not Origins(Path()).counts("s3://x/y")


def test_what_was_made_here_counts_after_an_older_record_of_a_remote(tmp_path: Path) -> None:
    store = Store(tmp_path)
    there = finish(Store(tmp_path / "there"), "merge", key_for("made"), finished="2025-01-01T00:00:00+00:00")
    store.remember(there, origin="s3://somewhere")
    assert store.record("merge", there.key) is None
    mine = finish(store, "merge", there.key)
    assert store.record("merge", mine.key) == mine


def test_metrics_that_a_remote_lost_do_not_matter(tmp_path: Path) -> None:
    store, remote = Store(tmp_path / "here"), open_remote(str(tmp_path / "remote"))
    record = finish(store, "merge", key_of({}))
    remote.offer(record, store.folder("merge", record.key))
    next((tmp_path / "remote").glob(f"merge-*/*/{METRICS}")).unlink()
    notes: list[Any] = []
    other = Store(tmp_path / "other")
    mirror = Mirror(str(tmp_path / "remote"), note=notes.append, tick=lambda: None, upload=True)
    assert mirror.look_up(other, "merge", record.key) == record
    assert other.record("merge", record.key) == record
    with other.lock("merge", record.key, waiting=Waiting()):
        assert mirror.fetch(other, record)
    assert not notes and json.loads((tmp_path / "other" / "origins" / f"{record.key}.json").read_text())["from"]


def answered(folder: Folder, answer: str) -> tuple[int, str]:
    """The exit code and the output of `run pull` on a terminal, where the user answers its question."""
    child, screen = pty.fork()
    if child == 0:
        os.execv(sys.executable, [*folder.command("pull", str(folder.recipe)), "--cache", str(folder.cache)])
    said = b""
    with contextlib.suppress(OSError):  # raised by Linux when the other end is closed
        while data := os.read(screen, 1 << 16):
            said += data
            if b"[y/N]" in said and answer:
                os.write(screen, answer.encode())
                answer = ""
    os.close(screen)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode()


def test_on_a_terminal_the_user_is_asked_once_about_the_remote_of_a_recipe(finished: Folder, tmp_path: Path) -> None:
    strange = strangers(finished, tmp_path)
    code, said = answered(strange, "n\n")
    assert code == 2 and "Whoever writes to it decides what its results hold" in said
    assert not (strange.cache / "records").exists() and not trusted_remotes()
    code, said = answered(strange, "y\n")
    assert code == 0 and said.count("fetched") == 2
    code, said = answered(strange, "")
    assert code == 0 and "[y/N]" not in said

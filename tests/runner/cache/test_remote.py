"""Remote caches: downloads are verified, uploads are complete or absent, and a run continues without a failing remote."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hub_server import OWNER, TOKEN, Hub, serve
from small_cache import flip
from small_recipe import ALL_CACHED, Folder

from runner.artifacts import METRICS
from runner.cache.record import Record, digest_of
from runner.cache.remote import DamagedRemoteError, Mirror, Remote, address_fault, open_remote
from runner.cache.store import Store, Waiting
from runner.cli import main
from runner.errors import RemoteError
from runner.graph import key_of
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe


def elsewhere(folder: Folder, name: str = "there") -> Folder:
    """The same recipe and data on another machine with an empty cache."""
    shutil.copytree(folder.root, folder.root.parent / name, ignore=shutil.ignore_patterns("cache"))
    return Folder(folder.root.parent / name)


def call(verb: str, folder: Folder, *options: str) -> int:
    return main([verb, str(folder.recipe), "--cache", str(folder.cache), *options])


def records(folder: Folder) -> list[Record]:
    return [record for entry in Plan(load_recipe(folder.recipe), Store(folder.cache)) if (record := entry.record)]


def memory(name: str) -> str:
    """An empty remote in the memory of this process."""
    files = fsspec.filesystem("memory")
    if files.exists(f"/{name}"):
        files.rm(f"/{name}", recursive=True)
    return f"memory://{name}"


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_pushed_artifact_is_pulled_elsewhere_unchanged(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    remote = memory("pushed") if kind == "memory" else str(tmp_path / "a shared 文件夹")
    there = elsewhere(folder)
    assert call("push", folder, "--remote", remote) == 0
    assert capsys.readouterr().out.count("uploaded") == len(ALL_CACHED)
    assert call("push", folder, "--remote", remote) == 0
    assert capsys.readouterr().out.count("already there") == len(ALL_CACHED)
    assert call("pull", there, "--remote", remote) == 0
    assert capsys.readouterr().out.count("fetched") == len(ALL_CACHED)
    assert there.states() == ALL_CACHED
    assert [record.sealed for record in records(there)] == [record.sealed for record in records(folder)]
    assert main(["verify", "--cache", str(there.cache)]) == 0


def test_a_run_fetches_only_the_artifacts_that_a_stage_reads(folder: Folder, tmp_path: Path) -> None:
    remote = str(tmp_path / "remote")
    assert call("push", folder, "--remote", remote) == 0
    there = elsewhere(folder)
    done = there.run("--remote", remote)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fetched from the remote") == 1
    assert there.states() == ALL_CACHED
    assert [path.name.partition("-")[0] for path in (there.cache / "stages").iterdir()] == ["pack"]
    done = there.run("--remote", remote, "--set", "stage.tokens.context=16")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fetched from the remote") == 2, "corpus and tokenizer, which the new stage reads"
    assert "uploaded to the remote" in done.stderr


def test_the_recipe_names_the_remote_and_whether_finished_stages_are_uploaded(finished: Folder, tmp_path: Path) -> None:
    shutil.copytree(finished.root, tmp_path / "here", ignore=shutil.ignore_patterns("cache"))
    here = Folder(tmp_path / "here")
    keys = [record.key for record in records(finished)]
    table = '\n[cache]\nremote = "mirror"\nupload = false\n'
    here.write(here.recipe.read_text() + table)
    assert here.run("--until", "corpus", "--trust-remote").returncode == 0
    assert not (here.root / "mirror").exists()
    here.write(here.recipe.read_text().replace("upload = false", ""))
    done = here.run("--until", "tokenizer")
    assert done.returncode == 0, done.stderr
    assert [path.stem for path in (here.root / "mirror" / "records").iterdir()] == keys[1:2], "what was made since"
    assert json.loads(here.call("plan", str(here.recipe), "--json").stdout)["stages"][0]["key"] == keys[0], "no part of keys"
    assert "mirror" not in (here.cache / "records" / f"{keys[1]}.json").read_text()


def test_the_command_line_overrides_the_environment_and_the_environment_the_recipe(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write(folder.recipe.read_text() + '\n[cache]\nremote = "of-recipe"\n')
    assert call("push", folder, "--trust-remote") == 0
    monkeypatch.setenv("STOCKPOT_REMOTE", str(tmp_path / "of-environment"))
    assert call("push", folder) == 0
    assert call("push", folder, "--remote", str(tmp_path / "of-option")) == 0
    assert all(
        (place / "records").is_dir()
        for place in (folder.root / "of-recipe", tmp_path / "of-environment", tmp_path / "of-option")
    )
    capsys.readouterr()
    assert call("push", folder, "--remote", "") == 2
    assert "expected a [cache] remote there" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["content", "record"])
def test_a_flipped_bit_in_the_remote_is_never_used(folder: Folder, tmp_path: Path, where: str) -> None:
    remote, there = tmp_path / "remote", elsewhere(folder)
    assert call("push", folder, "--remote", str(remote)) == 0
    if where == "content":
        (path,) = remote.glob("tokenizer-*/*/tokenizer.json")
        flip(path, 1000)
    else:
        for path in (remote / "records").iterdir():
            flip(path, 2000)
    if where == "content":
        assert call("pull", there, "--remote", str(remote)) == RemoteError.exit_code
        assert not list((there.cache / "stages").glob("tokenizer-*"))
    done = there.run("--remote", str(remote), "--set", "stage.tokens.context=16")
    assert done.returncode == 0, done.stderr
    assert "tokenizer  done in" in done.stderr
    assert there.digest("tokenizer") == folder.digest("tokenizer")
    assert not list((there.cache / "arriving").glob("*"))


def test_an_interrupted_upload_counts_as_missing(folder: Folder, tmp_path: Path) -> None:
    """The upload fails at each file in turn: the record comes last, and without it there is no artifact."""
    whole = tmp_path / "whole"
    assert call("push", folder, "--remote", str(whole)) == 0
    record = records(folder)[2]
    names = [*record.files, *record.attachments]
    for cut in range(len(names)):
        files = _Failing(cut)
        remote = Remote(files, str(tmp_path / f"cut-{cut}"), name="test")
        with pytest.raises(RemoteError, match="the line is cut"):
            remote.offer(record, Store(folder.cache).folder(record.kind, record.key))
        assert remote.record(record.kind, record.key) is None
        files.left = 1000
        assert remote.offer(record, Store(folder.cache).folder(record.kind, record.key))
        assert remote.record(record.kind, record.key) == record


class _Failing(fsspec.get_filesystem_class("file")):  # type: ignore[misc]
    cachable = False

    def __init__(self, left: int) -> None:
        super().__init__(auto_mkdir=True)
        self.left = left

    def put_file(self, path: str, place: str, **more: Any) -> None:
        if self.left == 0:
            raise ConnectionError("the line is cut")
        self.left -= 1
        super().put_file(path, place, **more)


class _Hanging(fsspec.get_filesystem_class("file")):  # type: ignore[misc]
    cachable = False
    requests = 0

    def info(self, place: str, **more: Any) -> dict[str, Any]:
        type(self).requests += 1
        threading.Event().wait()
        raise AssertionError


def test_a_remote_that_does_not_answer_times_out(tmp_path: Path) -> None:
    remote = Remote(_Hanging(), str(tmp_path), name="slow://place", seconds=0.3)
    with pytest.raises(RemoteError, match="slow://place: no answer within 0 s"):
        remote.record("merge", "0" * 64)


def test_a_request_to_stop_ends_the_wait_for_a_remote(tmp_path: Path) -> None:
    def tick() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Remote(_Hanging(), str(tmp_path), name="slow", tick=tick).record("merge", "0" * 64)


def test_an_unreachable_remote_is_one_warning_and_the_run_continues(finished: Folder, tmp_path: Path) -> None:
    shutil.copytree(finished.root, tmp_path / "here", ignore=shutil.ignore_patterns("cache"))
    here = Folder(tmp_path / "here")
    (tmp_path / "file").touch()
    done = here.call(
        "run", str(here.recipe), "--remote", "hf://ada/cache", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DISABLE_XET="1"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: ") == 1
    assert "continuing without this remote" in done.stderr
    assert here.states() == ALL_CACHED


def test_pushing_to_an_unreachable_remote_fails_with_its_name(
    folder: Folder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert call("push", folder, "--remote", str(tmp_path / "file" / "below")) == RemoteError.exit_code
    assert "Traceback" not in capsys.readouterr().err


def test_planning_and_a_cached_run_ask_no_remote(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write(folder.recipe.read_text() + '\n[cache]\nremote = "hf://ada/cache"\n')
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPROFILEIMPORTTIME": "1"}
    for verb in ("plan", "run"):
        done = folder.call(verb, str(folder.recipe), **unreachable)
        assert done.returncode == 0
        assert "warning: " not in done.stderr
        assert "fsspec" not in done.stderr and "huggingface_hub" not in done.stderr


@pytest.mark.parametrize(
    "name", ["../out", "/etc/out", "a/../../out", ".work/x", "a\\b", "record.json", "", "a//b", "./a", "nul\0"]
)
def test_a_remote_record_with_a_file_name_outside_its_folder_is_refused(folder: Folder, tmp_path: Path, name: str) -> None:
    honest = records(folder)[1]
    files = {**honest.files, name: "0" * 64}
    hostile = Record({**honest.data, "files": files, "digest": digest_of(files)})
    (tmp_path / "remote" / "records").mkdir(parents=True)
    (tmp_path / "remote" / "records" / f"{honest.key}.json").write_bytes(hostile.sealed)
    with pytest.raises(DamagedRemoteError, match=r"records/.*expected the form of a record, got files\."):
        open_remote(str(tmp_path / "remote")).record(honest.kind, honest.key)


def test_a_remote_record_of_another_identity_or_key_is_refused(folder: Folder, tmp_path: Path) -> None:
    honest = records(folder)[1]
    place = tmp_path / "remote" / "records" / f"{honest.key}.json"
    place.parent.mkdir(parents=True)
    remote = open_remote(str(tmp_path / "remote"))
    place.write_bytes(honest.sealed)
    assert remote.record(honest.kind, honest.key) == honest
    identity = {**honest.data["identity"], "version": 99}
    for changed in (
        {"identity": identity},
        {"identity": identity, "key": key_of(identity)},
        {"digest": "0" * 64},
        {"kind": "x"},
    ):
        place.write_bytes(Record({**honest.data, **changed}).sealed)
        with pytest.raises(DamagedRemoteError, match="expected the"):
            remote.record(honest.kind, honest.key)
    for content in (b"", b"{}", honest.sealed[:-1], b"\xff" * 400):
        place.write_bytes(content)
        with pytest.raises(DamagedRemoteError, match="expected"):
            remote.record(honest.kind, honest.key)


def test_an_artifact_without_metrics_is_accepted(folder: Folder, tmp_path: Path) -> None:
    record = next(record for record in records(folder) if METRICS in record.attachments)
    (Store(folder.cache).folder(record.kind, record.key) / METRICS).unlink()
    remote, there = open_remote(str(tmp_path / "remote")), Store(tmp_path / "other")
    remote.offer(record, Store(folder.cache).folder(record.kind, record.key))
    with there.lock(record.kind, record.key, waiting=Waiting()):
        remote.fetch(record, there)
    assert there.has_artifact(record, reread=True)


def test_a_missing_file_in_the_remote_is_damage_and_the_remote_stays_in_use(folder: Folder, tmp_path: Path) -> None:
    record, notes = records(folder)[1], list[str]()
    open_remote(str(tmp_path / "remote")).offer(record, Store(folder.cache).folder(record.kind, record.key))
    next((tmp_path / "remote").glob("tokenizer-*/*/tokenizer.json")).unlink()
    mirror = Mirror(str(tmp_path / "remote"), note=notes.append, tick=lambda: None, upload=True)
    store = Store(tmp_path / "other")
    assert not mirror.fetch(store, record)
    assert "it is made here instead" in notes[0]
    assert mirror.look_up(store, record.kind, record.key) == record
    with pytest.raises(DamagedRemoteError, match="expected a file, got none"):
        open_remote(str(tmp_path / "remote")).fetch(record, store)


def test_a_forced_stage_ignores_the_remote(folder: Folder, tmp_path: Path) -> None:
    assert call("push", folder, "--remote", str(tmp_path / "remote")) == 0
    done = folder.run("--remote", str(tmp_path / "remote"), "--force", "tokenizer")
    assert done.returncode == 0, done.stderr
    assert "fetched" not in done.stderr
    assert "tokenizer  done in" in done.stderr


@pytest.mark.parametrize(
    "address",
    [
        "ftp://x",
        "simplecache::s3://b",
        "s3://",
        "s3://key:secret@bucket/x",
        "hf://token@owner/name",
        "",
        "  ",
        "a\0b",
        "github://x",
    ],
)
def test_an_invalid_remote_address_is_refused_while_reading_the_recipe(
    folder: Folder, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    assert address_fault(address)
    folder.write(folder.recipe.read_text() + f"\n[cache]\nremote = {json.dumps(address)}\n")
    assert call("plan", folder) == 2
    output = capsys.readouterr().err
    assert "cache.remote" in output
    assert "secret" not in output


def test_a_missing_package_is_named(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec("s3fs"):
        pytest.fail("expected an environment without s3fs")
    assert call("push", folder, "--remote", "s3://bucket/cache") == RemoteError.exit_code
    assert "pip install s3fs" in capsys.readouterr().err


def test_a_remote_folder_outside_the_recipe_folder_needs_the_users_permission(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write(folder.recipe.read_text() + f"\n[cache]\nremote = {json.dumps(str(tmp_path / 'team'))}\n")
    assert call("push", folder) == 2
    assert "cache.remote: expected a path in" in (output := capsys.readouterr().err) and f"--allow-path {tmp_path}" in output
    assert call("push", folder, "--allow-path", str(tmp_path)) == 2, "the user has to agree to it, too"
    assert call("push", folder, "--allow-path", str(tmp_path), "--trust-remote") == 0
    assert (tmp_path / "team" / "records").is_dir()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        yield hub


def test_a_hub_repository_is_a_remote_and_an_artifact_is_one_commit(folder: Folder, hub: Hub, tmp_path: Path) -> None:
    there = elsewhere(folder)
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    create = f"from huggingface_hub import HfApi; HfApi().create_repo('{OWNER}/cache')"
    subprocess.run([sys.executable, "-c", create], check=True, env={**os.environ, **environment})
    pushed = folder.call("push", str(folder.recipe), "--remote", f"hf://{OWNER}/cache/mine", **environment)
    assert pushed.returncode == 0, pushed.stderr
    commits = hub.repositories[f"{OWNER}/cache"].commits
    assert len(commits) == 1 + len(ALL_CACHED)
    pulled = there.call("pull", str(there.recipe), "--remote", f"hf://{OWNER}/cache/mine", **environment)
    assert pulled.returncode == 0, pulled.stderr
    assert there.states() == ALL_CACHED
    assert main(["verify", "--cache", str(there.cache)]) == 0


def test_what_reads_an_artifact_fetches_it_or_names_the_command_that_does(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, there = str(tmp_path / "shared"), elsewhere(folder)
    assert call("push", folder, "--remote", remote) == 0
    assert call("path", there, "tokens") == 1
    capsys.readouterr()
    assert call("path", there, "tokens", "--remote", remote) == 0
    told = capsys.readouterr()
    assert Path(told.out.strip()).is_dir() and "tokens: fetched from the remote" in told.err
    assert "corpus: fetched" not in told.err  # records are enough for what is not read
    assert call("path", there, "corpus") == 1
    assert "`run pull` fetches it from a remote that has it" in capsys.readouterr().err
    monkeypatch.setenv("STOCKPOT_REMOTE", remote)
    other = elsewhere(folder, "other")
    assert call("report", other, "--out", str(tmp_path / "report.md")) == 0
    assert "finished; " in (tmp_path / "report.md").read_text() and not list((other.cache / "stages").glob("*"))
    assert call("chat", other) == 2 and "expected a finished model, got none" in capsys.readouterr().err

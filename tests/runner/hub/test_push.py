"""Pushes to a local HTTP server with the Hub's API: the resulting commits, and refusals."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import OTHER, OTHER_TOKEN, OWNER, TOKEN, Hub
from releases import REPO, Releases, digest_of, held_by, somebody_commits, summaries

from runner import credentials
from runner.errors import StageError
from runner.hub.push import push
from runner.hub.receipts import Journal
from runner.hub.target import Target
from runner.stages.publish import Publish

# huggingface_hub 2.4 hands files to its HTTP client in a way that the client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def releases(tmp_path: Path, hub: Hub) -> Releases:
    return Releases(tmp_path, hub)


def sent(hub: Hub) -> int:
    return sum(request.startswith("PUT /lfs/") for request in hub.requests)


def test_a_download_returns_the_pushed_files(hub: Hub, releases: Releases, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    releases.push("one")
    folder = Path(snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "cache"))
    downloaded = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".gitattributes"}
    assert downloaded == releases.content("one")


def test_a_release_is_one_commit(hub: Hub, releases: Releases) -> None:
    receipt = releases.push("one")
    assert summaries(hub) == ["initial commit", f"Release {digest_of('one')[:12]}"]
    assert receipt.url == f"{hub.url}/{REPO}/commit/{hub.repositories[REPO].branches['main']}"


def test_a_repository_without_owner_belongs_to_the_owner_of_the_token(hub: Hub, releases: Releases) -> None:
    releases.push("one", repo="model")
    assert hub.repositories[REPO].private
    last = Journal.read(releases.receipts, Target("model", endpoint=hub.url)).last
    assert last is not None
    assert last.commit == hub.repositories[REPO].branches["main"]


def test_a_new_repository_is_private_unless_the_recipe_says_otherwise(hub: Hub, releases: Releases) -> None:
    releases.push("one", private=False)
    assert not hub.repositories[REPO].private


def test_a_new_release_uploads_only_new_weights_and_removes_old_files(hub: Hub, releases: Releases) -> None:
    releases.push("one", "adapter/config.json", "old.txt")
    order = releases.order("one", "adapter/config.json")
    files = {name: path for name, path in order.files.items() if name != "old.txt"}
    files["config.json"].write_text('{"changed": true}')
    push(replace(order, files=files, digest=digest_of("two")), receipts=releases.receipts)
    assert sent(hub) == 1
    assert held_by(hub)["config.json"] == b'{"changed": true}'
    assert held_by(hub).keys() == files.keys()


def test_an_existing_release_is_not_pushed_again_even_without_a_receipt(hub: Hub, releases: Releases) -> None:
    first = releases.push("one")
    for path in releases.receipts.iterdir():
        path.unlink()
    assert releases.push("one").commit == first.commit
    assert len(summaries(hub)) == 2
    assert sent(hub) == 1


def test_a_new_branch_starts_at_main_and_gets_one_commit(hub: Hub, releases: Releases) -> None:
    releases.push("one")
    releases.push("two", branch="next/2")
    releases.push("three", branch="next/2")
    assert held_by(hub) == releases.content("one")
    assert held_by(hub, "next/2") == releases.content("three")
    assert summaries(hub)[1:] == [f"Release {digest_of(version)[:12]}" for version in ("one", "two", "three")]


def test_a_pull_request_changes_no_branch_and_is_opened_once(hub: Hub, releases: Releases) -> None:
    releases.push("one")
    receipt = releases.push("two", pull_request=True)
    assert held_by(hub) == releases.content("one")
    assert held_by(hub, "refs/pr/1") == releases.content("two")
    assert receipt.url == f"{hub.url}/{REPO}/discussions/1"
    assert releases.push("two", pull_request=True).url == receipt.url
    assert [name for name in hub.repositories[REPO].branches if name.startswith("refs/")] == ["refs/pr/1"]


def test_a_pull_request_may_be_opened_where_only_others_may_write(
    hub: Hub, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases.push("one", private=False)
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    with pytest.raises(StageError, match="next run pushes it"):
        releases.push("two")
    releases.push("two", pull_request=True)
    assert hub.repositories[REPO].at("refs/pr/1").author == OTHER  # type: ignore[union-attr]  # a test that fails here says enough


def test_a_tag_marks_the_commit(hub: Hub, releases: Releases) -> None:
    receipt = releases.push("one", tag="v1")
    assert hub.repositories[REPO].tags == {"v1": receipt.commit}


def test_a_later_tag_sends_no_files(hub: Hub, releases: Releases) -> None:
    receipt = releases.push("one")
    releases.push("one", tag="v1")
    assert hub.repositories[REPO].tags == {"v1": receipt.commit}
    assert len(summaries(hub)) == 2


def test_a_tag_of_another_release_is_refused_before_anything_is_pushed(hub: Hub, releases: Releases) -> None:
    first = releases.push("one", tag="v1")
    with pytest.raises(StageError, match=f"'v1' marks another release, {first.commit[:12]}"):
        releases.push("two", tag="v1")
    assert held_by(hub) == releases.content("one")
    second = releases.push("two", tag="v1", overwrite=True)
    assert hub.repositories[REPO].tags == {"v1": second.commit}


def test_a_branch_changed_by_someone_else_needs_overwrite(hub: Hub, releases: Releases) -> None:
    first = releases.push("one")
    somebody_commits(hub)
    head = hub.repositories[REPO].branches["main"]
    with pytest.raises(StageError) as caught:
        releases.push("two")
    message = f"it is at {head[:12]} of 2026-01-01 02:00 UTC by grace, 'A nicer card', since {first.commit[:12]} was pushed"
    assert message in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert hub.repositories[REPO].branches["main"] == head
    releases.push("two", overwrite=True)
    assert held_by(hub) == {**releases.content("two"), "NOTES.md": b"mine"}


def test_a_repository_with_files_of_others_is_not_overwritten(hub: Hub, releases: Releases) -> None:
    releases.push("one")
    for path in releases.receipts.iterdir():
        path.unlink()
    with pytest.raises(StageError, match=f"by {OWNER}, .* and nothing was pushed there from this cache"):
        releases.push("two")


def test_a_concurrent_commit_is_detected_by_the_server(hub: Hub, releases: Releases) -> None:
    releases.push("one")
    hub.before_commit = somebody_commits
    with pytest.raises(StageError, match="by grace, 'A nicer card'"):
        releases.push("two")
    assert held_by(hub) == {**releases.content("one"), "NOTES.md": b"mine"}
    hub.before_commit = somebody_commits
    releases.push("two", overwrite=True)
    assert held_by(hub) == {**releases.content("two"), "NOTES.md": b"mine"}


def test_there_is_one_journal_per_endpoint_repository_branch_and_pull_request(hub: Hub, releases: Releases) -> None:
    releases.push("one")
    others = [
        Target(f"{OWNER}/other", endpoint=hub.url),
        Target(REPO, branch="dev", endpoint=hub.url),
        Target(REPO, endpoint="http://localhost:1"),
        Target(REPO, endpoint=hub.url, pull_request=True),
    ]
    assert [Journal.read(releases.receipts, target).last for target in others] == [None] * 4
    journal = Journal.read(releases.receipts, Target(REPO, endpoint=hub.url))
    assert [receipt.digest for receipt in journal.receipts] == [digest_of("one")]


def test_a_refused_push_leaves_no_receipt_and_hides_the_token(hub: Hub, releases: Releases) -> None:
    with pytest.raises(StageError, match="the release is finished, and the next run pushes it") as caught:
        releases.push("one", repo="somebody-else/model")
    assert "rights" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert Journal.read(releases.receipts, Target("somebody-else/model", endpoint=hub.url)).last is None
    assert hub.repositories == {}


def test_no_file_on_disk_contains_the_token(releases: Releases, tmp_path: Path) -> None:
    releases.push("one")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_the_token_comes_from_the_environment_else_from_the_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "huggingface" / "token"
    path.parent.mkdir()
    path.write_text("from-login\n")
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    assert credentials.token() == "from-environment"
    monkeypatch.delenv("HF_TOKEN")
    assert credentials.token() == "from-login"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    assert credentials.token() is None
    monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    assert credentials.token() == "from-login"


def test_deciding_whether_to_push_imports_no_hub_client() -> None:
    code = (
        "import sys; from pathlib import Path; from runner import credentials; from runner.hub import "
        "receipts, target; credentials.token(); "
        "receipts.Journal.read(Path('.'), target.Target('a/b')); assert not {'huggingface_hub', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pushing_imports_no_torch(hub: Hub, releases: Releases, tmp_path: Path) -> None:
    files = {name: str(path) for name, path in releases.make("one").items()}
    code = (
        "import json, sys; from pathlib import Path; from runner.credentials import endpoint; from "
        "runner.hub.push import PushRequest, push; from runner.hub.target import Target\n"
        f"files = {{name: Path(path) for name, path in json.loads({json.dumps(files)!r}).items()}}\n"
        "order = PushRequest(Path('.'), files, 'd' * 64, Target('model', endpoint=endpoint()))\n"
        f"push(order, receipts=Path({str(tmp_path / 'receipts')!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert REPO in hub.repositories


@pytest.mark.parametrize(
    "fields", [{"pull_request": True, "tag": "v1"}, {"pull_request": True, "branch": "dev"}, {"branch": "a b"}, {"tag": "-v"}]
)
def test_contradictory_fields_of_publish_are_errors_of_the_recipe(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"branch|tag"):
        Publish.model_validate({"model": "base", "repo": "a/b", **fields})

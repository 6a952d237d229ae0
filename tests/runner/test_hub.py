"""Pushing to a real HTTP server that speaks the Hub's API, and the receipts that decide whether to."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import OWNER, TOKEN, Hub, serve

from runner import hub as client
from runner.errors import StageError
from runner.hub import Target

# huggingface_hub 2.4 hands files to its HTTP client in a way that the client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlicense: mit\n---\n# A model\n"
DIGEST = "d" * 64


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # this Hub has no Xet store
        yield running


@pytest.fixture
def release(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    return {path.name: path for path in folder.iterdir()}


def push(target: Target, release: dict[str, Path], tmp_path: Path, *, private: bool = False, digest: str = DIGEST) -> str:
    return client.push(
        tmp_path / "release", target, files=release, private=private, digest=digest, receipts=tmp_path / "receipts"
    )


def test_what_was_pushed_is_what_is_downloaded(hub: Hub, release: dict[str, Path], tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    push(Target(f"{OWNER}/model", endpoint=hub.url), release, tmp_path)
    folder = Path(snapshot_download(f"{OWNER}/model", endpoint=hub.url, cache_dir=tmp_path / "cache"))
    downloaded = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".gitattributes"}
    assert downloaded == {name: path.read_bytes() for name, path in release.items()}


def test_a_release_is_one_commit(hub: Hub, release: dict[str, Path], tmp_path: Path) -> None:
    url = push(Target(f"{OWNER}/model", endpoint=hub.url), release, tmp_path)
    commits = list(hub.repositories[f"{OWNER}/model"].commits.values())
    assert [commit.summary for commit in commits] == ["initial commit", f"Release {DIGEST[:12]}"]
    assert url.endswith(commits[-1].oid)


def test_a_name_without_owner_is_in_the_space_of_the_token(hub: Hub, release: dict[str, Path], tmp_path: Path) -> None:
    target = Target("model", endpoint=hub.url)
    push(target, release, tmp_path, private=True)
    assert hub.repositories[f"{OWNER}/model"].private
    receipt = client.read_receipt(tmp_path / "receipts", target, DIGEST)
    assert receipt is not None
    assert receipt["repo"] == f"{OWNER}/model"
    assert receipt["commit"] == hub.repositories[f"{OWNER}/model"].branches["main"]


def test_a_new_release_goes_into_the_same_repository_and_uploads_only_new_weights(
    hub: Hub, release: dict[str, Path], tmp_path: Path
) -> None:
    target = Target(f"{OWNER}/model", endpoint=hub.url)
    push(target, release, tmp_path)
    release["config.json"].write_text('{"changed": true}')
    push(target, release, tmp_path, digest="e" * 64)
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
    assert hub.repositories[f"{OWNER}/model"].at("main").files["config.json"].data == b'{"changed": true}'


def test_receipts_are_one_per_endpoint_repository_branch_and_digest(tmp_path: Path) -> None:
    targets = [
        (Target("a/b"), DIGEST),
        (Target("a/c"), DIGEST),
        (Target("a/b", branch="next"), DIGEST),
        (Target("a/b", endpoint="http://localhost"), DIGEST),
        (Target("a/b"), "e" * 64),
    ]
    assert len({client.receipt_path(tmp_path, target, digest) for target, digest in targets}) == len(targets)
    client.receipt_path(tmp_path, *targets[0]).write_text(json.dumps({"commit": "c"}))
    assert [client.read_receipt(tmp_path, *target) is not None for target in targets] == [True] + [False] * 4


def test_a_push_that_is_refused_leaves_no_receipt_and_never_tells_the_token(
    hub: Hub, release: dict[str, Path], tmp_path: Path
) -> None:
    target = Target("somebody-else/model", endpoint=hub.url)
    with pytest.raises(StageError, match="the release is finished, and the next run pushes it") as caught:
        push(target, release, tmp_path)
    assert "rights" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert client.read_receipt(tmp_path / "receipts", target, DIGEST) is None
    assert hub.repositories == {}


def test_no_file_on_disk_holds_the_token(hub: Hub, release: dict[str, Path], tmp_path: Path) -> None:
    push(Target("model", endpoint=hub.url), release, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_hub_that_cannot_be_reached_is_an_error_of_one_paragraph(hub: Hub, release: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        push(Target("a/b", endpoint="http://127.0.0.1:9"), release, tmp_path)  # the discard port: nobody listens
    assert "\n" not in str(caught.value)


def test_the_token_is_that_of_the_environment_else_of_the_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "huggingface" / "token"
    path.parent.mkdir()
    path.write_text("from-login\n")
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    assert client.token() == "from-environment"
    monkeypatch.delenv("HF_TOKEN")
    assert client.token() == "from-login"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    assert client.token() is None
    monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    assert client.token() == "from-login"


def test_deciding_whether_to_push_imports_no_hub_client() -> None:
    code = (
        "import sys; from pathlib import Path; from runner import hub; hub.token(); "
        "hub.read_receipt(Path('.'), hub.Target('a/b'), 'd'); assert not {'huggingface_hub', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pushing_imports_no_torch(hub: Hub, release: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from runner import hub\n"
        f"folder = Path({str(tmp_path / 'release')!r})\n"
        "files = {path.name: path for path in folder.iterdir()}\n"
        "target = hub.Target('model', endpoint=hub.endpoint())\n"
        f"hub.push(folder, target, files=files, private=True, digest={DIGEST!r}, receipts=folder.parent / 'receipts')\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert f"{OWNER}/model" in hub.repositories

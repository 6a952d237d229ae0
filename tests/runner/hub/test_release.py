"""A release from end to end against a local Hub: run, publish, roll back, and run a published model."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import OWNER, Hub, Repository, serve, use
from random_model import random_model
from releases import held_by, somebody_commits, summaries

from runner.cli import main
from runner.hub.receipts import Journal, Receipt
from runner.hub.target import Target

# huggingface_hub 2.4 hands files to its HTTP client in a way that the client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = f"{OWNER}/tiny"
RECIPE = """
name = "tiny"
[stage.base]
kind = "checkpoint"
folder = "model"
[stage.release]
kind = "publish"
model = "base"
license = "{license}"
repo = "ada/tiny"
private = false
tag = "{tag}"
"""


class World:
    """A folder with a model and a recipe, a cache, and a Hub."""

    def __init__(self, root: Path, hub: Hub) -> None:
        self.root, self.hub, self.recipe, self.cache = root, hub, root / "recipe.toml", root / "cache"

    def write(self, *, license: str = "mit", tag: str = "v1") -> None:
        self.recipe.write_text(RECIPE.format(license=license, tag=tag))

    def call(self, *words: str | Path) -> int:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            return main([*map(str, words), "--cache", str(self.cache)])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world with two releases pushed one after the other."""
    root = tmp_path_factory.mktemp("world")
    random_model(root / "model", ["The heart pumps."], 280, seed=1)
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        world = World(root, hub)
        use(hub, patch, root)
        for license, tag in (("mit", "v1"), ("apache-2.0", "v2")):
            world.write(license=license, tag=tag)
            assert world.call("run", world.recipe) == 0
        yield world


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A copy with its own Hub."""
    shutil.copytree(made.root, tmp_path / "world")
    with serve() as hub:
        hub.repositories = {name: copy_of(repository) for name, repository in made.hub.repositories.items()}
        hub.blobs = dict(made.hub.blobs)
        for path in (tmp_path / "world/cache/receipts").glob("*.json"):  # they name the Hub by its address
            receipts = json.loads(path.read_text())["receipts"]
            output = tuple(Receipt(**{**one, "files": tuple(one["files"])}) for one in receipts)
            Journal(Target("ada/tiny", endpoint=hub.url), output).write(path.parent)
        use(hub, monkeypatch, tmp_path)
        copy = World(tmp_path / "world", hub)
        copy.write(license="apache-2.0", tag="v2")
        yield copy


def copy_of(repository: Repository) -> Repository:
    return Repository(
        repository.private, commits=dict(repository.commits), branches=dict(repository.branches), tags=dict(repository.tags)
    )


def license_at(hub: Hub, revision: str = "main") -> str:
    card = held_by(hub, revision, REPO)["README.md"].decode()
    return next(line.partition(": ")[2] for line in card.splitlines() if line.startswith("license: "))


def test_each_release_is_one_tagged_commit_and_a_second_run_pushes_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [license_at(world.hub, tag) for tag in ("v1", "v2", "main")] == ["mit", "apache-2.0", "apache-2.0"]
    assert len(summaries(world.hub, REPO)) == 3
    assert world.call("run", world.recipe) == 0
    assert world.call("publish", world.recipe) == 0
    assert world.hub.requests == []
    assert "release: already there: " in capsys.readouterr().out


def test_stock_transformers_load_a_release_from_the_hub_and_generate(world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REPO, cache_dir=tmp_path / "downloads")
    model = AutoModelForCausalLM.from_pretrained(REPO, cache_dir=tmp_path / "downloads")
    output = model.generate(**tokenizer("The heart", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
    assert output.shape[1] >= 5
    assert any(request.startswith("GET") and request.endswith("/model.safetensors") for request in world.hub.requests)


def test_rolling_back_restores_every_file_without_sending_weights_and_run_does_not_undo_it(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.call("rollback", world.recipe) == 0
    assert held_by(world.hub, "main", REPO) == held_by(world.hub, "v1", REPO)
    assert len(summaries(world.hub, REPO)) == 4
    assert not [request for request in world.hub.requests if request.startswith("PUT")]
    assert world.call("run", world.recipe) == 0
    assert license_at(world.hub) == "mit"
    assert "holds another release since" in capsys.readouterr().err
    assert world.call("why", world.recipe, "release") == 0
    assert "`run publish` puts this one there again" in capsys.readouterr().out
    assert world.call("publish", world.recipe) == 0
    assert held_by(world.hub, "main", REPO) == held_by(world.hub, "v2", REPO)
    assert len(summaries(world.hub, REPO)) == 5


def test_a_second_rollback_needs_an_earlier_release_or_a_tag_or_commit(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.call("rollback", world.recipe) == 0
    assert world.call("rollback", world.recipe) == 3
    assert "the receipts have no earlier release; name a tag or a commit with --to" in capsys.readouterr().err
    assert world.call("rollback", world.recipe, "--to", "v2") == 0
    assert license_at(world.hub) == "apache-2.0"
    second = world.hub.repositories[REPO].tags["v1"]
    assert world.call("rollback", world.recipe, "--to", second[:8]) == 0
    assert license_at(world.hub) == "mit"
    assert world.call("rollback", world.recipe, "--to", "v9") == 3
    assert "expected an existing tag or commit, got 'v9'" in capsys.readouterr().err


def test_rolling_back_a_branch_changed_by_someone_else_needs_overwrite(world: World) -> None:
    somebody_commits(world.hub, REPO)
    assert world.call("rollback", world.recipe) == 3
    assert "NOTES.md" in held_by(world.hub, "main", REPO)
    assert world.call("rollback", world.recipe, "--overwrite") == 0
    assert held_by(world.hub, "main", REPO) == held_by(world.hub, "v1", REPO)


def test_publish_pushes_a_finished_release_and_runs_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.write(license="cc0-1.0", tag="v3")
    assert world.call("publish", world.recipe) == 3
    assert "expected a finished release, got the state run (license: " in capsys.readouterr().err
    assert world.hub.requests == []
    world.write(license="mit", tag="v1")
    assert world.call("publish", world.recipe) == 0
    assert license_at(world.hub) == "mit"


def test_publish_refuses_a_recipe_without_a_repository(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.recipe.write_text(world.recipe.read_text().replace('repo = "ada/tiny"', ""))
    assert world.call("publish", world.recipe) == 2
    assert world.call("rollback", world.recipe) == 2
    assert "expected a stage of the kind publish with a repo" in capsys.readouterr().err


@pytest.fixture
def elsewhere(world: World, tmp_path: Path) -> World:
    """Another machine, with an empty cache, no files and the same Hub."""
    (tmp_path / "elsewhere").mkdir()
    return World(tmp_path / "elsewhere", world.hub)


def test_a_published_model_is_reproduced_elsewhere_and_not_pushed(
    world: World, elsewhere: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.root / "model").rename(elsewhere.root / "files-of-ada")
    for path in list((elsewhere.root / "files-of-ada").iterdir()):  # found by content, not by name
        path.rename(path.with_name(f"x-{path.name}"))
    commits = summaries(world.hub, REPO)
    assert elsewhere.call("run", f"hf://{REPO}@v1", "--yes", "--data", elsewhere.root) == 0
    output = capsys.readouterr().err
    assert "2 of 2 results equal the published ones" in output
    assert "made here" in output
    assert summaries(world.hub, REPO) == commits
    assert elsewhere.call("run", f"hf://{REPO}@v1", "--yes") == 0
    assert "reused, as published" in capsys.readouterr().err


def test_a_published_model_is_only_shown_without_confirmation(
    world: World, elsewhere: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = "n\n"
    assert elsewhere.call("run", f"hf://{REPO}", "--data", world.root) == 2
    output = capsys.readouterr()
    assert "not run, since there is no terminal for a confirmation; pass --yes to run it" in output.err
    assert [line.split()[:3] for line in output.err.splitlines()[1:4]] == [
        ["base", "checkpoint", "run"],
        ["release-parity", "parity", "waiting"],
        ["release", "publish", "waiting"],
    ]
    monkeypatch.setattr("sys.stdin", Terminal(answers))
    assert elsewhere.call("run", f"hf://{REPO}", "--data", world.root) == 1
    assert not (elsewhere.cache / "stages").exists()


class Terminal:
    """A terminal with a user who answers."""

    def __init__(self, answer: str) -> None:
        self.readline: Callable[[], str] = lambda: answer

    def isatty(self) -> bool:
        return True


def test_missing_input_files_are_named_with_their_digests(
    world: World, elsewhere: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert elsewhere.call("run", f"hf://{REPO}", "--yes") == 2
    output = capsys.readouterr()
    lock = json.loads(held_by(world.hub, "main", REPO)["recipe.lock.json"])
    files = lock["stages"]["base"]["data"]["folder"]
    assert {file["file"] for file in files} >= {"model/config.json", "model/model.safetensors"}
    assert all(f"{file['file']}  {file['sha256']}" in output.err for file in files)
    assert "the input files of base are missing; pass their folder with --data DIR" in output.err


def test_results_are_reused_without_their_input_files(
    world: World, elsewhere: World, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(world.root / "model")
    shutil.copytree(world.cache / "stages", elsewhere.cache / "stages")
    assert elsewhere.call("run", f"hf://{REPO}", "--yes") == 0
    output = capsys.readouterr().err
    assert "reused, as published" in output
    assert "whose result is reused" in output


def test_a_remote_provides_results_that_cannot_be_made_here(world: World, elsewhere: World) -> None:
    remote = world.root / "remote"
    assert world.call("push", world.recipe, "--remote", remote) == 0
    shutil.rmtree(world.root / "model")
    assert elsewhere.call("run", f"hf://{REPO}", "--yes", "--remote", remote) == 0
    assert len(list((elsewhere.cache / "stages").glob("publish-*"))) == 1


def test_differences_from_the_lock_file_are_shown(world: World, elsewhere: World, capsys: pytest.CaptureFixture[str]) -> None:
    repository = world.hub.repositories[REPO]
    head = repository.commits[repository.branches["main"]]
    lock = json.loads(head.files["recipe.lock.json"].data)
    for locked in lock["stages"].values():
        locked["versions"]["torch"] = "1.0.0"
        locked["hardware"] |= {"cores": 1234, "gpus": ["NVIDIA \x1b[31mH100"]}
    lock["stages"]["base"]["key"] = "0" * 64
    changed = type(head.files["recipe.lock.json"])(json.dumps(lock).encode(), lfs=False)
    repository.commit("main", "changed", {**head.files, "recipe.lock.json": changed})
    assert elsewhere.call("run", f"hf://{REPO}", "--data", world.root) == 2
    output = capsys.readouterr().err
    assert "torch: 1.0.0 there, " in output
    assert "cores: 1234 there, " in output
    assert "gpus: 1 there, 0 here" in output
    assert "made here; its fields, inputs or version differ" in output
    assert "\x1b" not in output


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"recipe.toml": None}, "expected a model that was published by this program, got one without recipe.toml"),
        ({"recipe.lock.json": b"{}"}, "expected the lock file of a release, got something else"),
        ({"recipe.lock.json": b"[" * 100_000}, "expected the lock file of a release, got something else"),
        ({"recipe.toml": b'extends = "/etc/passwd"'}, "expected a resolved recipe"),
        ({"recipe.toml": b'name = "x"\n[stage.other]\nkind = "corpus"'}, "to name input files in the recipe, got None"),
    ],
)
def test_a_repository_that_is_not_a_release_is_refused(
    world: World, elsewhere: World, capsys: pytest.CaptureFixture[str], change: dict[str, bytes | None], complaint: str
) -> None:
    repository = world.hub.repositories[REPO]
    files = dict(repository.commits[repository.branches["main"]].files)
    for name, content in change.items():
        old = files.pop(name)
        if content is not None:
            files[name] = type(old)(content, lfs=False)
    repository.commit("main", "changed", files)
    assert elsewhere.call("run", f"hf://{REPO}", "--yes") == 2
    assert complaint in capsys.readouterr().err


def test_a_lock_file_cannot_choose_where_files_are_written(
    world: World, elsewhere: World, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = world.hub.repositories[REPO]
    head = repository.commits[repository.branches["main"]]
    lock = head.files["recipe.lock.json"].data.replace(b"model/config.json", b"model/..")
    files = {**head.files, "recipe.lock.json": type(head.files["recipe.toml"])(lock, lfs=False)}
    repository.commit("main", "changed", files)
    assert elsewhere.call("run", f"hf://{REPO}", "--yes", "--data", world.root) == 2
    assert "expected plain file names, got '..'" in capsys.readouterr().err


def test_an_invalid_address_and_a_missing_model_are_refused(elsewhere: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert elsewhere.call("run", "hf://tiny") == 2
    assert "expected hf://OWNER/NAME[@REVISION], got 'hf://tiny'" in capsys.readouterr().err
    assert elsewhere.call("run", "hf://ada/nothing") == 3
    assert "has no such model" in capsys.readouterr().err

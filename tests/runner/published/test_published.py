"""Input files of a published recipe: found by their content, or promised."""

import hashlib
import json
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hub_server import OWNER, File, Hub, Repository

from runner.cache import digests
from runner.cache.store import Store
from runner.errors import RecipeError
from runner.planning.plan import Plan
from runner.published.recipe import Address, Published, download_recipe
from runner.recipe.recipe import Recipe, load_recipe

REPO = f"{OWNER}/model"
RECIPE = """
name = "model"
[cache]
remote = "hf://ada/cache"
[tracking]
to = ["wandb"]
[stage.corpus]
kind = "corpus"
sources = [{ files = "../texts/part-?.jsonl", name = "text" }, { files = "one.txt", name = "one" }]
[stage.tokenizer]
kind = "tokenizer"
corpus = "corpus"
vocab_size = 300
[stage.tokens]
kind = "pack"
corpus = "corpus"
tokenizer = "tokenizer"
context = 32
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 16, layers = 1, heads = 2 }
batch_tokens = 64
budget = { tokens = 640 }
schedule = { kind = "cosine", learning_rate = 1e-3 }
[stage.release]
kind = "publish"
model = "base"
license = "mit"
repo = "ada/model"
tag = "v1"
"""


@pytest.fixture
def author(tmp_path: Path, hub: Hub) -> Recipe:
    """A recipe with its files; its lock file and resolved form are on the Hub as in a release."""
    (tmp_path / "author/recipes").mkdir(parents=True)
    (tmp_path / "author/texts").mkdir()
    for number in (2, 1):
        (tmp_path / f"author/texts/part-{number}.jsonl").write_text(json.dumps({"text": f"part {number}"}))
    (tmp_path / "author/recipes/one.txt").write_text("one")
    (tmp_path / "author/recipes/recipe.toml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "author/recipes/recipe.toml", allowed=[tmp_path / "author"])
    store = Store(tmp_path / "author-cache")
    fields = [("sources[0].files", recipe.stages["corpus"].sources[0].files)]  # type: ignore[attr-defined]  # of the kind corpus
    fields += [("sources[1].files", recipe.stages["corpus"].sources[1].files)]  # type: ignore[attr-defined]
    data = store.digests.named_contents(fields, recipe.path.parent)
    locked = {"key": key_of_corpus(recipe, store), "digest": "d" * 64, "data": data}
    put(hub, {"recipe.toml": tomli_w.dumps(recipe.resolved()), "recipe.lock.json": json.dumps({"stages": {"corpus": locked}})})
    return recipe


def put(hub: Hub, files: dict[str, str]) -> None:
    repository = hub.repositories.setdefault(REPO, Repository(private=False))
    head = repository.at("main")
    added = {name: File(text.encode(), lfs=name.endswith(".bin")) for name, text in files.items()}
    repository.commit("main", "published", {**(head.files if head else {}), **added})


def key_of_corpus(recipe: Recipe, store: Store) -> str:
    return str(Plan(recipe, store).entries["corpus"].key)


def brought(tmp_path: Path, *data: Path) -> tuple[Published, Recipe, Store]:
    store = Store(tmp_path / "cache")
    published = download_recipe(Address.parse(f"hf://{REPO}"), store, data=data)
    return published, load_recipe(published.recipe, absent=store.digests.promised), store


def test_files_are_found_by_content_and_the_keys_equal_the_authors(author: Recipe, tmp_path: Path) -> None:
    for number, path in enumerate([*tmp_path.glob("author/texts/*"), tmp_path / "author/recipes/one.txt"]):
        (tmp_path / "found/deep").mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / f"found/deep/{number}")
    published, recipe, store = brought(tmp_path, tmp_path / "found")
    assert not published.absent
    assert key_of_corpus(recipe, store) == published.lock.stages["corpus"].key
    texts = [path.read_text() for path in recipe.stages["corpus"].sources[0].files.matches()]  # type: ignore[attr-defined]
    assert [json.loads(text)["text"] for text in texts] == ["part 1", "part 2"]


def test_missing_files_are_promised_so_that_keys_are_known(author: Recipe, tmp_path: Path) -> None:
    (tmp_path / "author/texts/part-1.jsonl").rename(tmp_path / "elsewhere")
    published, recipe, store = brought(tmp_path, tmp_path / "author")
    (contents,) = published.absent.values()
    assert [content.file for content in contents] == ["../texts/part-1.jsonl", "../texts/part-2.jsonl"]
    assert key_of_corpus(recipe, store) == published.lock.stages["corpus"].key
    with pytest.raises(RecipeError, match="expected a file, got nothing"):
        load_recipe(published.recipe)


def test_known_and_published_files_are_found_without_a_data_folder(
    author: Recipe, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "FRESH_SECONDS", -1.0)  # also what was just written is remembered
    cached = load_recipe(author.path, allowed=[tmp_path / "author"])
    key_of_corpus(cached, Store(tmp_path / "cache"))
    put(hub, {"one.txt": "one", "other/name.bin": json.dumps({"text": "part 1"})})
    (tmp_path / "author/recipes/one.txt").unlink()
    (tmp_path / "author/texts/part-1.jsonl").unlink()
    published, recipe, store = brought(tmp_path)
    assert not published.absent
    assert key_of_corpus(recipe, store) == published.lock.stages["corpus"].key


def test_a_file_with_the_right_name_and_other_content_is_not_used(author: Recipe, hub: Hub, tmp_path: Path) -> None:
    put(hub, {"one.txt": "two"})
    published, _, _ = brought(tmp_path, tmp_path / "author/texts")
    assert [content.sha256 for contents in published.absent.values() for content in contents] == [
        hashlib.sha256(b"one").hexdigest()
    ]


def test_a_placed_file_that_changed_is_searched_again(author: Recipe, tmp_path: Path) -> None:
    published, recipe, _ = brought(tmp_path, tmp_path / "author")
    place = recipe.stages["corpus"].sources[1].files.matches()[0]  # type: ignore[attr-defined]
    place.unlink()
    place.write_text("changed")
    published, _, _ = brought(tmp_path, tmp_path / "author")
    assert not published.absent
    assert place.read_text() == "one"


def test_the_authors_cache_trackers_and_push_target_are_removed(author: Recipe, tmp_path: Path) -> None:
    published, recipe, _ = brought(tmp_path, tmp_path / "author")
    table = tomllib.loads(published.recipe.read_text())
    assert not table.keys() & {"cache", "tracking"}
    assert table["stage"]["release"].keys() & {"repo", "branch", "tag", "pull_request"} == set()
    assert recipe.head.cache.remote is None


def test_a_branch_is_requested_each_time_and_a_commit_once(author: Recipe, hub: Hub, tmp_path: Path) -> None:
    first, _, store = brought(tmp_path)
    commit = hub.repositories[REPO].branches["main"]
    put(hub, {"one.txt": "one"})
    assert brought(tmp_path)[0].name != first.name
    assert download_recipe(Address.parse(f"hf://{REPO}@{commit}"), store, data=[]).name == first.name
    requests = len(hub.requests)
    download_recipe(Address.parse(f"hf://{REPO}@{commit}"), store, data=[])
    assert len(hub.requests) == requests


@pytest.mark.parametrize("text", ["hf://name", "hf://a/b/c", "hf://a/b@", "hf://../b@c d", "hf://a/b?x=1"])
def test_an_address_needs_an_owner_and_a_name(text: str) -> None:
    with pytest.raises(RecipeError, match="expected hf://OWNER/NAME"):
        Address.parse(text)

"""Identity and order: what moves a key and what does not."""

from pathlib import Path
from typing import Any

from runner.cache.store import Store
from runner.graph import ancestors, differences, identity, in_order, key_of, sources_of
from runner.recipe.recipe import Recipe, load_recipe

RECIPE = """
name = "graph"
[stage.tokens]
kind = "pack"
corpus = "text"
tokenizer = "vocab"
context = 64
[stage.vocab]
kind = "tokenizer"
corpus = "text"
vocab_size = 300
[stage.text]
kind = "corpus"
sources = [{ files = "text.jsonl" }]
"""


def load(folder: Path, text: str = RECIPE, overrides: tuple[str, ...] = ()) -> Recipe:
    folder.mkdir(exist_ok=True)
    (folder / "text.jsonl").write_text('{"text": "one document"}\n', encoding="utf-8")
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "recipe.toml", overrides)


def keys(recipe: Recipe, cache: Path) -> dict[str, str]:
    """Keys with every artifact's digest set to the name of its kind."""
    store = Store(cache)
    digests = {name: stage.kind for name, stage in recipe.stages.items()}
    return {name: key_of(what) for name, what in identities(recipe, digests, store).items()}


def identities(recipe: Recipe, digests: dict[str, str], store: Store) -> dict[str, dict[str, Any]]:
    return {name: identity(stage, artifacts=digests, files=store.digests.of_inputs) for name, stage in recipe.stages.items()}


def test_order_is_topological_with_ties_as_written(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert in_order(sources_of(recipe.stages)) == ["text", "vocab", "tokens"]
    assert ancestors(sources_of(recipe.stages), "tokens") == {"text", "vocab"}


def test_renaming_a_stage_keeps_every_key(tmp_path: Path) -> None:
    before = keys(load(tmp_path), tmp_path)
    after = keys(load(tmp_path, RECIPE.replace('vocab"', 'words"').replace("stage.vocab", "stage.words")), tmp_path)
    assert [*before.values()] == [*after.values()]


def test_writing_out_a_default_or_a_comment_keeps_every_key(tmp_path: Path) -> None:
    written = RECIPE.replace("vocab_size = 300", "vocab_size = 300 # words\nmin_frequency = 2")
    assert keys(load(tmp_path), tmp_path) == keys(load(tmp_path, written), tmp_path)


def test_moving_the_files_keeps_every_key(tmp_path: Path) -> None:
    assert keys(load(tmp_path / "a"), tmp_path) == keys(load(tmp_path / "b"), tmp_path)


def test_no_key_depends_on_the_parallel_layout(tmp_path: Path) -> None:
    assert keys(load(tmp_path), tmp_path) == keys(load(tmp_path, overrides=("parallel.processes=2",)), tmp_path)


def test_a_field_changes_only_the_key_of_its_stage(tmp_path: Path) -> None:
    before, after = keys(load(tmp_path), tmp_path), keys(load(tmp_path, overrides=("stage.vocab.vocab_size=301",)), tmp_path)
    assert [name for name in before if before[name] != after[name]] == ["vocab"]


def test_the_content_of_an_input_file_changes_the_key_but_its_time_does_not(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    before = keys(recipe, tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "one document"}\n', encoding="utf-8")
    assert keys(recipe, tmp_path) == before
    (tmp_path / "text.jsonl").write_text('{"text": "another one!"}\n', encoding="utf-8")
    assert keys(recipe, tmp_path)["text"] != before["text"]


def test_the_format_of_an_input_file_changes_the_key_but_its_name_does_not(tmp_path: Path) -> None:
    before = keys(load(tmp_path), tmp_path)
    (tmp_path / "other.jsonl").write_bytes((tmp_path / "text.jsonl").read_bytes())
    (tmp_path / "text.txt").write_bytes((tmp_path / "text.jsonl").read_bytes())
    assert keys(load(tmp_path, RECIPE.replace("text.jsonl", "other.jsonl")), tmp_path) == before
    assert keys(load(tmp_path, RECIPE.replace("text.jsonl", "text.txt")), tmp_path)["text"] != before["text"]


def test_differences_name_the_field_with_both_values(tmp_path: Path) -> None:
    store, digests = Store(tmp_path), {"text": "1", "vocab": "2", "tokens": "3"}
    old = identities(load(tmp_path), digests, store)
    new = identities(load(tmp_path, overrides=("stage.vocab.vocab_size=301",)), {**digests, "text": "9"}, store)
    assert differences(old["vocab"], new["vocab"]) == ["corpus: its content changed", "vocab_size: 300 -> 301"]
    assert differences(old["vocab"], old["vocab"]) == []

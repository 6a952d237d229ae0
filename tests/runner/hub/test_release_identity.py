"""What a release says is part of its key: a copied recipe with other words never publishes the old ones. Where and how it is
made and pushed is neither in the key nor in the release.
"""

from pathlib import Path

import pytest
import tomli
import tomli_w

from runner.cache.store import Store
from runner.graph import changes, differences, identity, key_of
from runner.recipe.recipe import Recipe, load_recipe

RECIPE = """
name = "first"
description = "The first."
[stage.corpus]
kind = "corpus"
sources = [{ files = "text.txt" }]
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
architecture = { hidden_size = 16, layers = 1, heads = 1 }
[stage.scores]
kind = "evaluate"
model = "base"
tasks = [{ name = "text", task = "text", files = "text.txt" }]
gates = [{ score = "text.bits_per_byte", at_most = 9.0 }]
[stage.out]
kind = "publish"
model = "base"
scores = ["scores"]
"""


def load(tmp_path: Path, text: str = RECIPE, *overrides: str) -> Recipe:
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "recipe.toml").write_text(text)
    return load_recipe(tmp_path / "recipe.toml", overrides)


def keys(recipe: Recipe) -> dict[str, str]:
    """The key of the first stage of each kind; each makes an artifact named by its kind."""
    digests, files = (
        {name: stage.kind for name, stage in recipe.stages.items()},
        Store(recipe.path.parent / "c").digests.of_inputs,
    )
    found: dict[str, str] = {}
    for stage in recipe.stages.values():
        found.setdefault(
            stage.kind, key_of(identity(stage, artifacts=digests, files=files, recipe=lambda: recipe.published({})))
        )
    return found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "first"', 'name = "second"'),
        ('description = "The first."', 'description = "The second."'),
        ('description = "The first."', ""),
        ("base", "foundation"),
        ("scores]", "quality]\n#"),
        ("at_most = 9.0", "at_most = 8.0"),
        ("gates = ", "# "),
        ("vocab_size = 300", "vocab_size = 300\n[stage.other]\nkind = 'tokenizer'\ncorpus = 'corpus'\nvocab_size = 301"),
    ],
)
def test_words_of_a_recipe_are_part_of_the_key_of_its_release_alone(tmp_path: Path, old: str, new: str) -> None:
    text = RECIPE.replace(old, new)
    if "quality" in new:
        text = RECIPE.replace("stage.scores", "stage.quality").replace('["scores"]', '["quality"]')
    before, after = keys(load(tmp_path)), keys(load(tmp_path, text))
    assert {kind for kind in before if before[kind] != after[kind]} == {"publish"}


@pytest.mark.parametrize(
    "override",
    [
        'stage.out.repo="ada/model"',
        'stage.out.tag="v1"',
        'stage.out.branch="next"',
        "stage.out.private=false",
        "stage.out.pull_request=true",
        "parallel.processes=4",
        'parallel.precision="bf16"',
        "tracking.to=[]",
        'cache.remote="mirror"',
        'alerts.notify=["ntfy://x"]',
    ],
)
def test_where_and_how_it_runs_is_neither_in_the_key_nor_in_the_release(tmp_path: Path, override: str) -> None:
    plain, changed = load(tmp_path), load(tmp_path, RECIPE, override)
    assert plain.resolved() != changed.resolved() or "notify" in override
    assert keys(plain) == keys(changed)
    assert plain.published({}) == changed.published({})


def test_a_release_holds_nothing_that_its_key_does_not(tmp_path: Path) -> None:
    """Each value of the recipe in a release is changed in turn; the key changes with every one."""
    recipe = load(tmp_path)
    published = recipe.published({})
    assert not published.keys() & {"cache", "parallel", "tracking"}
    stage = recipe.stages["out"]

    def key(table: object) -> str:
        return key_of(
            identity(stage, artifacts=dict.fromkeys(recipe.stages, "x"), files=lambda file: [], recipe=lambda: table)
        )  # type: ignore[arg-type, return-value]

    values = [
        ("name",),
        ("description",),
        *(("stage", name, field) for name, table in published["stage"].items() for field in table),
    ]
    found = {key(published)}
    for place in values:
        table = tomli.loads(tomli_w.dumps(published))
        inner = table
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = "another"
        found.add(key(table))
    assert len(found) == 1 + len(values)


def test_the_reason_names_the_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    what = [
        identity(
            recipe.stages["out"],
            artifacts=dict.fromkeys(recipe.stages, "x"),
            files=lambda file: [],
            recipe=lambda n=n: {"name": n},
        )
        for n in ("one", "two")
    ]
    assert differences(*what) == ["recipe: its content changed"]
    assert not changes(what[0]["fields"], what[0]["fields"])

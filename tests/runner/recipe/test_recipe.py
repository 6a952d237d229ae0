"""Recipes: what is accepted, and that every fault is told at once with its place, what was found and what was wanted."""

from pathlib import Path

import pytest
import tomli
import tomli_w

from runner.errors import RecipeError
from runner.graph import input_files
from runner.recipe.recipe import load_recipe
from runner.recipe.schema import docstrings, recipe_schema
from runner.stage import Identity, Spec
from runner.stages import stage_kinds

RECIPES = Path(__file__).parents[3] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.toml"))


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    (folder / "text.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def faults(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value).splitlines()


GOOD = """
name = "good"
seed = 7
[stage.corpus]
kind = "corpus"
sources = [{ files = "text.jsonl" }]
[stage.tokenizer]
kind = "tokenizer"
corpus = "corpus"
vocab_size = 300
"""


def test_every_fault_is_reported_at_once_with_its_dotted_path(tmp_path: Path) -> None:
    lines = faults(
        tmp_path,
        """
name = "bad"
sede = 3
[stage.corpus]
kind = "corpus"
sources = [{ files = "missing-*.jsonl", wieght = 2.0 }]
[stage.tokenizer]
kind = "tokenizr"
[stage.tokens]
kind = "pack"
corpus = "corpus"
tokenizer = "tokenizer"
context = "long"
""",
    )
    text = "\n".join(lines)
    assert "sede: is not known here" in text
    assert "did you mean 'seed'?" in text
    assert "stage.corpus.sources[0].wieght: is not known here" in text
    assert "did you mean 'weight'?" in text
    assert "stage.tokenizer.kind: expected one of baseline, checkpoint, " in text
    assert "got 'tokenizr'; did you mean 'tokenizer'?" in text
    assert "stage.tokens.context: expected a valid integer, got 'long'" in text
    assert all(line.startswith(str(tmp_path / "recipe.toml")) for line in lines)


def test_a_file_that_does_not_exist_is_a_fault(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, GOOD.replace("text.jsonl", "nothing/*.jsonl"))
    assert f"stage.corpus.sources[0].files: expected a file, got nothing at {tmp_path}/nothing/*.jsonl" in line


def test_a_dangling_reference_names_the_nearest_stage(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, GOOD.replace('corpus = "corpus"', 'corpus = "corpsu"'))
    assert "stage.tokenizer.corpus: expected the name of a stage, got 'corpsu'; did you mean 'corpus'?" in line


def test_a_reference_to_the_wrong_artifact_names_both_types(tmp_path: Path) -> None:
    tokens = '[stage.tokens]\nkind = "pack"\ncorpus = "tokenizer"\ntokenizer = "tokenizer"\ncontext = 8\n'
    (line,) = faults(tmp_path, GOOD + tokens)
    assert "stage.tokens.corpus: expected Corpus, but 'tokenizer' makes Tokenizer; these make it: corpus" in line


def test_a_cycle_is_shown_whole(tmp_path: Path) -> None:
    merge = '[stage.{0}]\nkind = "sft"\nmodel = "{1}"\ndata = [{{ files = "text.jsonl" }}]\nbudget = {{ steps = 1 }}\n'
    text = "\n".join(faults(tmp_path, 'name = "x"\n' + merge.format("a", "b") + merge.format("b", "a")))
    assert "expected stages without a cycle, got a -> b -> a" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not TOML"),
        ('name = "x"', "stage: expected at least one [stage.NAME] table"),
        ('[stage]\na = 1\n[stage.b]\nkind = "corpus"', "stage.a: expected a table, got 1"),
        ('stage = 3\nname = "x"', "stage: expected at least one"),
        (
            'name = "a b"\n[stage.c]\nkind = "corpus"\nsources = [{files = "text.jsonl"}]',
            "name: expected a text like '^\\w[\\w.-]{0,99}$', got 'a b'",
        ),
        ('name = "x"\n[stage.c]\n', "stage.c.kind: is missing; expected one of"),
        (GOOD + "[stage.tokenzer]\nvocab_size = 400\n", "trunk; did you mean stage 'tokenizer'?"),
        ('name = "x"\n[stage.c]\nkind = 3\n', "stage.c.kind: expected one of baseline, checkpoint, corpus, dpo, "),
        ('name = "x"\n[stage.c]\nkind = "corpus"\n', "stage.c.sources: is missing"),
        ("extends = 3", "extends: expected the path of a recipe"),
        ('extends = "gone.toml"', "gone.toml: no such recipe, which recipe.toml extends"),
        ('extends = "recipe.toml"', "extends: expected a file that does not extend this one"),
    ],
)
def test_malformed_recipes_get_one_clear_sentence(tmp_path: Path, text: str, message: str) -> None:
    assert message in "\n".join(faults(tmp_path, text))


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(RecipeError, match="expected UTF-8 text, got byte 0xff"):
        load_recipe(tmp_path / "recipe.toml")


def test_the_recipes_seed_is_the_default_of_every_stage_with_randomness(tmp_path: Path) -> None:
    recipe = load_recipe(SHIPPED[0], ["seed=11"])
    seeds = {getattr(stage, "seed", 11) for stage in recipe.stages.values()}
    assert seeds == {11}


def test_a_recipe_overrides_what_it_extends_and_paths_stay_with_their_file(tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    write(below, GOOD)
    child = write(
        tmp_path, 'extends = "below/recipe.toml"\nname = "child"\n[stage.tokenizer]\nvocab_size = 400\n', "child.toml"
    )
    recipe = load_recipe(child)
    assert recipe.head.name == "child"
    assert recipe.head.seed == 7
    assert recipe.stages["tokenizer"].model_dump()["vocab_size"] == 400
    assert recipe.resolved()["stage"]["corpus"]["sources"][0]["files"] == "below/text.jsonl"


def test_overriding_a_kind_inside_a_table_keeps_the_rest_of_the_table(tmp_path: Path) -> None:
    parent = RECIPES / "medical-lora.toml"
    child = write(
        tmp_path, f'extends = "{parent}"\n[stage.base]\nschedule = {{ kind = "cosine" }}\nbudget = {{ steps = 3 }}\n'
    )
    old = load_recipe(parent).resolved()["stage"]["base"]
    new = load_recipe(child, allowed=[RECIPES]).resolved()["stage"]["base"]
    assert new["schedule"] == {**old["schedule"], "kind": "cosine"}
    assert new["budget"] == {"steps": 3}, "a budget names one of several things: the child's replaces its parent's"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.processes=0", "parallel.processes: expected greater than or equal to 1, or 'auto', got 0"),
        (
            "parallel={strategy='fsdp',find_unused_parameters=true}",
            'parallel.find_unused_parameters: expected false with strategy = "fsdp", got true; strategy = "ddp" can find them',
        ),
        ("stage.base.budget={epochs=inf}", "stage.base.budget.epochs: expected a finite number, got inf"),
        ("stage.base.architecture={preset=[1]}", "stage.base.architecture"),
        ("stage.base.architecture.heads=5", "hidden_size: expected a multiple of heads, got hidden_size 192 and heads 5"),
        (
            "stage.after.gates=[{score='section.f1',at_least=0.9}]",
            "score of a gate: expected one of this evaluation, got 'section.f1'",
        ),
        (
            "stage.after.tasks=[{name='t',task='text',files='data/section_dev.jsonl.gz',text='{text}',limt=3}]",
            "tasks[0].limt: is not",
        ),
        (
            "stages.x.kind=corpus",
            "stages: is not known here; expected one of alerts, cache, description, extends, name, parallel, seed, stage",
        ),
    ],
)
def test_invalid_values_are_reported_with_their_place(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPES / "medical-lora.toml", [override])
    assert message in str(caught.value)


def test_a_base_in_four_bits_with_fsdp_is_refused_while_planning() -> None:
    overrides = ["parallel.strategy=fsdp", "stage.medical.quantize=nf4"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPES / "medical-lora.toml", overrides)
    expected = 'stage.medical.quantize: expected parallel.strategy = "ddp" beside "nf4", got "fsdp"'
    assert expected in str(caught.value)
    load_recipe(RECIPES / "medical-lora.toml", [*overrides, "parallel.processes=1"])


def test_a_folder_and_a_file_with_glob_characters_in_their_names_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "d[1] 数据"
    folder.mkdir()
    (folder / "b[1].jsonl").write_text('{"text": "a"}\n')
    recipe = load_recipe(write(folder, GOOD.replace("text.jsonl", "b[1].jsonl")))
    ((_, file),) = input_files(recipe.stages["corpus"])
    assert [path.name for path in file.matches()] == ["b[1].jsonl"]
    load_recipe(write(folder, GOOD.replace("text.jsonl", "t*.jsonl")))


def test_overrides_are_toml_else_strings(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD), ["stage.tokenizer.vocab_size=500", "name=other", "stage.corpus.validation=0.5"]
    )
    assert recipe.stages["tokenizer"].model_dump()["vocab_size"] == 500
    assert recipe.head.name == "other"
    assert faults(tmp_path, GOOD, ("stage.tokenizer.vocab_sise=1",))[0].count("did you mean 'vocab_size'?") == 1
    with pytest.raises(RecipeError, match="expected KEY=VALUE"):
        load_recipe(write(tmp_path, GOOD), ["seed"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_resolves_to_a_recipe_that_means_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    text = tomli_w.dumps(recipe.resolved())
    written = path.parent / ".resolved.toml"
    try:
        written.write_text(text, encoding="utf-8")
        again = load_recipe(written)
    finally:
        written.unlink()
    assert again.resolved() == recipe.resolved()
    assert again.stages == recipe.stages


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_points_at_the_schema_and_explains_itself(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#:schema recipe.schema.json\n")
    for word in ("Hardware:", "Time:", "Result:"):
        assert word in text.split("name =")[0]


def test_the_schema_beside_the_recipes_is_current() -> None:
    import json

    written = json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(recipe_schema())), "write it again: run schema > recipes/recipe.schema.json"


def specs() -> list[type[Spec]]:
    stage_kinds()
    found, open_classes = [], [Spec]
    while open_classes:
        for child in open_classes.pop().__subclasses__():
            found.append(child)
            open_classes.append(child)
    return [spec for spec in found if spec.__module__.startswith("runner.")]


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.__name__)
def test_every_field_is_marked_and_described(spec: type[Spec]) -> None:
    for name, field in spec.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Identity)]
        assert len(marks) == 1, f"{spec.__name__}.{name}: expected exactly one of Semantic[...] and Execution[...]"
        assert docstrings(spec).get(name), f"{spec.__name__}.{name} has no docstring"


def test_the_resolved_recipe_is_toml(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert tomli.loads(tomli_w.dumps(recipe.resolved()))["stage"]["tokenizer"]["corpus"] == "corpus"

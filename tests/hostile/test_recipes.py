"""Recipes that are made to break the one who reads them: each is a sentence, soon, and in little memory."""

import resource
import time
from pathlib import Path

import pytest

from llm.text.templates import split_template
from runner.cli import main
from runner.errors import RecipeError
from runner.published.recipe import _without_user_fields

CORPUS = "[stage.a]\nkind = 'corpus'\n"
RECIPES = {
    "a dotted key": ".".join(["a"] * 20_000) + " = 1",
    "a dotted table": "[" + ".".join(["a"] * 20_000) + "]\nx = 1",
    "a dotted key below the parser's limit": CORPUS + ".".join(["a"] * 900) + " = 1",
    "a dotted sweep": "[sweep]\nstage." + ".".join(["a"] * 900) + " = [1]",
    "a quoted sweep": "[sweep]\n'stage." + ".".join(["a"] * 30_000) + "' = [1]",
    "lists": "x = " + "[" * 5000 + "]" * 5000,
    "lists below the parser's limit": CORPUS + "sources = " + "[" * 390 + "]" * 390,
    "tables": "x = " + "{a = " * 3000 + "1" + "}" * 3000,
    "a long number": "seed = " + "9" * 100_000,
    "a long number of another base": "seed = 0x" + "f" * 100_000,
    "a number without end": "seed = 1e999999",
    "no number": "seed = nan",
    "many stages": "\n".join(f"[stage.a{number}]\nkind = 'corpus'" for number in range(10_000)),
    "braces": CORPUS + "sources = [{ files = '*.jsonl', text = '" + "{a}" * 100_000 + "{' }]",
    "a template with a format": CORPUS + "sources = [{ files = '*.jsonl', text = '{text:{width}}' }]",
    "stars": CORPUS + "sources = [{ files = '" + "*a" * 100 + "b' }]",
    "a zero byte": "'\\u0000' = 1",
    "itself": "extends = 'recipe.toml'",
    "a device": "extends = '/dev/zero'",
    "a folder": "extends = '.'",
    "a link out": "extends = 'link.toml'",
    "bytes": "\udcff",
    "attempts": "[stage.a]\nkind = 'lora'\nattempts = [" + "{ a.b.c = 1 }, " * 5000 + "]",
    "a class": CORPUS + "__class__ = 'x'",
    "a kind of Python": "[stage.a]\nkind = '__init__'",
    "a local time": "seed = 07:32:00",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_made_to_break_its_reader_is_a_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(100):
        (tmp_path / ("a" * 60 + f"{number}.jsonl")).write_text('{"text": "x"}\n')
    (tmp_path / "link.toml").symlink_to("/etc/passwd")
    path = tmp_path / "recipe.toml"
    path.write_bytes(f'name = "x"\n{RECIPES[name]}'.encode(errors="surrogateescape"))
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["plan", str(path), "--cache", str(tmp_path / "cache")]) == 2
    assert time.process_time() - begun < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10
    said = capsys.readouterr().err
    assert "Traceback" not in said and str(tmp_path) in said


@pytest.mark.parametrize("name", ["text.__class__", "text!r", "text[0]", "0", "__class__"])
def test_a_template_names_columns_and_nothing_of_python(name: str) -> None:
    assert split_template(f"a {{{name}}}") == ("a ", name, "")


@pytest.mark.parametrize("name", ["a dotted key below the parser's limit", "a long number", "lists", "a dotted table"])
def test_a_published_recipe_is_read_with_the_same_limits(name: str) -> None:
    with pytest.raises(RecipeError, match="there: "):
        _without_user_fields(RECIPES[name] + ("\n[stage.b]\n" if "stage" not in RECIPES[name] else ""), "there")


@pytest.mark.parametrize(
    "value", [".".join(["a"] * 5000) + "=1", "seed=" + "9" * 100_000, "x=" + "[" * 5000, "seed=0x" + "f" * 9000]
)
def test_a_value_of_the_command_line_is_a_sentence_too(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text('name = "x"\n')
    assert main(["plan", str(tmp_path / "recipe.toml"), "--set", value]) == 2
    assert "Traceback" not in capsys.readouterr().err

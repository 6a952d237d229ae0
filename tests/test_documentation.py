"""The documentation: commands parse, TOML validates, links resolve, names exist, and examples run."""

import ast
import json
import os
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli
from printed_messages import ROOT

from runner import cli
from runner.engine.settings import Settings
from runner.recipe.head import Head
from runner.recipe.reference import recipe_reference
from runner.recipe.schema import recipe_schema
from runner.recipe.toml import _nested_sweep
from runner.recipe.validation import validated
from runner.stages import stage_kinds

PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.md"))]
EXTENDING = ROOT / "recipes" / "extending.md"
ARCHITECTURE = ROOT / "recipes" / "architecture.md"
PLACEHOLDERS = {"N": "1", "K": "0", "text|mermaid|svg": "text", "TAG|COMMIT": "v1", "20GB": "20GB"}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for named, text in fenced if named == language]


def command_lines() -> list[tuple[str, str]]:
    """Each command line of `run` in a code block of a page, without comments."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                command = re.sub(r"\s+#\s.*| > .*", "", line)
                if begin := re.search(r"(?:^|&& \.venv/bin/|\s)run (?!-)(.*)", command):
                    found.append((page.name, begin[1]))
        for block in blocks(page, ""):
            joined = re.sub(r"\n {4,}(?=\[)", " ", block)
            for line in joined.splitlines():
                command = re.split(r"\s{3,}(?!\[)|  (?=\S*[a-z\u4e00-\u9fff])", line)[0]
                found += [(page.name, part) for part in re.split(r"(?:, )?\brun ", command) if part.strip()]
    return found


def forms(synopsis: str) -> Iterator[list[str]]:
    """The shortest and the longest command line of a synopsis."""
    inner = re.sub(r"\[[@:]\w+\]", "", synopsis).replace("...", "")
    for text in (re.sub(r"\[[^\]]*\]", "", inner), inner.replace("[", " ").replace("]", " ")):
        yield [PLACEHOLDERS.get(word, word) for word in shlex.split(text)]


@pytest.mark.parametrize(("page", "command"), command_lines())
def test_a_command_line_on_a_page_is_accepted(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in forms(command):
        if words[0] not in cli.COMMANDS:
            words.insert(0, "run")
        try:
            cli._parser(words[:1]).parse_args(words)
        except SystemExit:
            pytest.fail(f"{page}: run {' '.join(words)}: {capsys.readouterr().err}")


def text_of(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def inline() -> list[tuple[str, str]]:
    """Each command that the text of a page names, often without its arguments."""
    return [(page.name, command) for page in PAGES for command in dict.fromkeys(re.findall(r"`run ([^`>]+)", text_of(page)))]


@pytest.mark.parametrize(("page", "command"), inline())
def test_a_command_in_the_text_exists(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    try:
        cli._parser(words[:1]).parse_args(words if words[0] in cli.COMMANDS else ["run", *words])
    except SystemExit:
        error = capsys.readouterr().err
        assert "arguments are required" in error, f"{page}: run {command}: {error}"


def test_every_command_is_in_both_lists() -> None:
    for page in (ROOT / "README.md", ROOT / "recipes" / "README.zh.md"):
        listed = {command.split()[0] for name, command in command_lines() if name == page.name}
        assert {*cli.COMMANDS} - listed <= {"run"}, page


@pytest.mark.parametrize(("page", "text"), [(page.name, text) for page in PAGES for text in blocks(page, "toml")])
def test_toml_on_a_page_validates(page: str, text: str) -> None:
    table = _nested_sweep(tomli.loads(text))
    if "slurm" in table:  # the user's file engine.toml
        Settings.model_validate(table)
        return
    faults: list[str] = []
    for name, fields in table.pop("stage", {}).items():
        kind = fields.pop("kind")
        if kind not in stage_kinds() and page == EXTENDING.name:
            continue
        attempts = fields.pop("attempts", [])
        for attempt in [{}, *attempts]:
            merged = {**fields, **{key: value for key, value in attempt.items() if key in stage_kinds()[kind].model_fields}}
            validated(stage_kinds()[kind], merged, f"stage.{name}.", faults)
    head = {key: table.pop(key) for key in list(table) if key in recipe_schema()["properties"]}
    validated(Head, {key: value for key, value in head.items() if key in Head.model_fields}, "", faults)
    if table:  # fields of one stage, without its table
        of_kinds: list[list[str]] = []
        for kind in (kind for kind in stage_kinds().values() if set(table) <= {*kind.model_fields}):
            validated(kind, table, "", of_kind := [])
            of_kinds.append([fault for fault in of_kind if not fault.endswith(": is missing")])
        faults += min(of_kinds, key=len)
    assert not [fault for fault in faults if not fault.endswith(": is missing")], page


def test_every_test_that_a_table_names_is_there() -> None:
    named = {name for page in PAGES for name in re.findall(r"\| `(test_\w+)` \|", page.read_text(encoding="utf-8"))}
    there = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert named <= there and named, named - there


def tree() -> list[Path]:
    """The folders named in the README's tree, relative to the root; captions name those inside a folder."""
    block = next(block for block in blocks(ROOT / "README.md", "") if block.startswith("recipes/"))
    folders: list[Path] = []
    for line in block.splitlines():
        indent, name, caption = re.match(r"( *)(\w+)/ +(.*)", line).groups()  # type: ignore[union-attr]
        top = next((folder for folder in reversed(folders) if len(folder.parts) == 1), Path())
        folder = top / name if indent else Path(name)
        folders += [folder, *(folder / inner for inner in re.findall(r"\b(\w+(?:/\w+)*)/(?!\w)", caption))]
    return folders


def test_the_tree_names_every_folder_of_the_two_packages_and_no_other() -> None:
    packages = {path.parent for name in ("runner", "llm", "stockpot") for path in (ROOT / name).rglob("__init__.py")}
    named = {ROOT / folder for folder in tree()}
    assert not packages - named
    assert not [folder for folder in named if not folder.is_dir()]


def test_the_layers_on_the_page_are_those_that_import_linter_holds() -> None:
    contracts = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = {contract["containers"][0]: contract["layers"] for contract in contracts if "containers" in contract}
    head, *rows = next(block for block in blocks(ARCHITECTURE, "text") if block.startswith("runner ")).splitlines()
    column = head.index("llm")
    assert [row[:column].strip() for row in rows] == layers["runner"]
    assert [name for row in rows if (name := row[column:].strip())] == layers["llm"]


@pytest.mark.parametrize("name", ["runner", "llm", "stockpot"])
def test_every_module_says_what_it_is(name: str) -> None:
    silent = [
        path.relative_to(ROOT)
        for path in (ROOT / name).rglob("*.py")
        if len((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split()) < 4
    ]
    assert not silent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_in_the_text_exist(page: Path) -> None:
    spans = re.findall(r"`([\w./]+)`", text_of(page))
    for span in spans:
        if re.match(r"(runner|llm|tests)/|.*/\w+\.(py|cpp)$", span):
            assert any((folder / span).exists() for folder in (ROOT, ROOT / "runner", ROOT / "llm")), span
        if re.match(r"(runner|llm)\.|(Stage|Context)\.", span):
            assert pydoc.locate(span if span[0].islower() else f"runner.stage.{span}"), span


def anchors(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them from headings."""
    text = text_of(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    text = text_of(page)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def test_the_reference_is_up_to_date() -> None:
    written = (ROOT / "recipes" / "reference.md").read_text(encoding="utf-8")
    assert written == recipe_reference(), "run schema --markdown > recipes/reference.md"


def test_the_chinese_page_has_the_figures_of_the_english_ones() -> None:
    english = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "README.zh.md")
    chinese = (ROOT / "recipes" / "README.zh.md").read_text(encoding="utf-8")
    figure = re.compile(r"\d+\.\d{2,}|\d,\d{3}")
    figures = set(figure.findall(chinese.split("## 性能")[1]))
    assert len(figures) > 15 and not sorted(figures - set(figure.findall(english)))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with the examples of the page, each in the file that its first line names."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("runner", "llm", "tests/llm", "tests/support"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for text in [*blocks(EXTENDING, "python"), *blocks(EXTENDING, "toml")]:
        path = root / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def python(root: Path, *words: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "STOCKPOT_CACHE": str(root / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_of_a_kind_runs(extended: Path) -> None:
    rows = [{"text": f"Document {number} tells of the number {number}" + " again" * number} for number in range(20)]
    (extended / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    python(extended, "runner.cli", "lengths.toml")
    folder = Path(python(extended, "runner.cli", "path", "lengths.toml", "measured").strip())
    found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert 0.8 < found["scores"]["lengths.long"] <= 1.0 and found["counts"]["lengths"] > 10
    stages = json.loads(python(extended, "runner.cli", "plan", "lengths.toml", "--json"))["stages"]
    assert [stage["state"] for stage in stages] == ["cached", "cached"]


def test_the_example_of_an_architecture_passes_the_contract(extended: Path) -> None:
    tests = ("tests/llm/models/test_families.py", "tests/llm/export/test_gguf_families.py")
    chosen = "seed_oss and (logits_and_gradients or cached or survives or llama_cpp)"
    output = python(extended, "pytest", "-q", "-n0", "-p", "no:cacheprovider", *tests, "-k", chosen)
    assert re.search(r"[5-9] passed", output), output

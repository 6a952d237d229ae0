"""Files that are none, or none of their kind: pipes, devices, folders and files without end where a recipe or a model should
be, and tokenizers, configurations and documents that ask for more than a machine has.
"""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import bounded
from foreign_models import smollm

from llm.errors import InputError
from llm.inference.json_grammar import schema_fault
from llm.models.checkpoint import CONFIG, WEIGHTS, read_config, read_weights
from llm.models.sampling_defaults import read_sampling
from llm.text.readers import read_rows
from llm.tokenizer.tokenizer import TextTokenizer
from runner.cache.ownership import cache_of
from runner.cli import main
from runner.completion import stages as completed_stages
from runner.errors import RecipeError
from runner.input_files import AllowedFolders

Make = Callable[[Path], object]


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 20 << 30)


def folder(path: Path) -> None:
    path.mkdir()


def latin(path: Path) -> None:
    path.write_bytes(b'description = "\xff"')


def listed(path: Path) -> None:
    path.write_text("[1, 2]")


STRANGE: list[Make] = [os.mkfifo, endless, sparse, folder]


def nested_schema(levels: int) -> list[Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return [schema]


def refused(work: Callable[[], object]) -> None:
    """Runs `work`, which has to refuse its input, within bounds."""

    def attempt() -> int:
        try:
            work()
        except InputError:
            return 3
        return 0

    assert bounded(attempt) == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


# Recipes


@pytest.mark.parametrize("make", [*STRANGE, latin], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["recipe.toml", "parent.toml"])
def test_a_recipe_that_is_no_file_of_text_is_refused_at_once(make: Make, name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('extends = "parent.toml"')
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    words = ["plan", str(tmp_path / "recipe.toml"), "--cache", str(tmp_path / "cache"), "--allow-path", "/dev"]
    assert bounded(lambda: main(words)) == 2


def test_recipes_that_extend_each_other_without_end_are_refused(tmp_path: Path) -> None:
    for number in range(400):
        (tmp_path / f"{number}.toml").write_text(f'extends = "{number + 1}.toml"')
    (tmp_path / "400.toml").write_text('name = "last"')
    assert bounded(lambda: main(["plan", str(tmp_path / "0.toml"), "--cache", str(tmp_path / "cache")])) == 2


def test_the_overview_and_the_list_show_recipes_whatever_lies_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for make in (*STRANGE, latin):
        make(tmp_path / f"{make.__name__}.toml")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    (tmp_path / "digits.toml").write_text("description = " + "9" * 5000)
    (tmp_path / "good.toml").write_text('description = "A good one."')
    monkeypatch.chdir(tmp_path)
    assert bounded(lambda: main([])) == 0
    assert bounded(lambda: main(["list", str(tmp_path)])) == 0


def test_names_of_stages_that_a_shell_might_run_are_not_proposed(tmp_path: Path) -> None:
    names = ["good", "$(touch /tmp/x)", "`id`", "a;b", "a\u001b[2Jb", "a\u000bb", "-x", ".."]
    tables = "\n".join(f"[stage.{json.dumps(name)}]" for name in names)
    (tmp_path / "recipe.toml").write_text(tables)
    asked: Any = type("Parsed", (), {"recipe": tmp_path / "recipe.toml"})()
    assert completed_stages("", asked) == ["good"]


def test_what_is_hidden_in_the_home_folder_is_not_read_by_a_recipe_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "keys.txt").write_text("secret")
    (tmp_path / "words.txt").symlink_to(tmp_path / ".ssh" / "keys.txt")
    (tmp_path / "plain.txt").write_text("plain")
    folders = AllowedFolders(tmp_path)
    assert folders.contain(tmp_path / "plain.txt")
    assert not folders.contain(tmp_path / ".ssh" / "keys.txt")
    assert not folders.contain(tmp_path / "words.txt")
    assert AllowedFolders(tmp_path, (tmp_path / ".ssh",)).contain(tmp_path / "words.txt")
    (own := tmp_path / "project").mkdir()
    assert AllowedFolders(own).contain(own / ".data" / "rows.txt"), "a project may hide what it likes"


def test_a_cache_that_is_a_link_of_somebody_else_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOCKPOT_CACHE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (outside := tmp_path / "outside").mkdir()
    (own := tmp_path / "own").mkdir()
    (own / "pyproject.toml").touch()
    (own / "cache").symlink_to(outside)
    with pytest.raises(RecipeError, match="--cache"):
        cache_of(own / "recipe.toml", None)
    assert not list(outside.iterdir())
    assert cache_of(own / "recipe.toml", own / "cache") == outside
    assert cache_of(own / "recipe.toml", None) == outside, "named once, it is the user's"


# Models


@pytest.mark.parametrize("make", [*STRANGE, latin, listed], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", WEIGHTS])
def test_a_file_of_a_model_that_is_none_is_refused_at_once(make: Make, name: str, copy: Path) -> None:
    (copy / name).unlink()
    make(copy / name)

    def read() -> None:
        config, vocab_size = read_config(copy / CONFIG)
        TextTokenizer.load(copy)
        read_sampling(copy)
        read_weights(copy, config, vocab_size=vocab_size)

    refused(read)


def replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def changed(copy: Path, **parts: Any) -> None:
    path = copy / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
CROWD = [{"id": 400 + number, "content": f"<{number}>", **ADDED} for number in range(60_000)]


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [replaced("a", "aa")] * 40}},
        {"normalizer": replaced("a", "a" * 2_000_000)},
        {"normalizer": replaced("", "x")},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 50_000_000}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAAAAAA"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAD/////"}},
        {"normalizer": {"type": "Sequence", "normalizers": 5}},
        {"decoder": {"type": "Sequence", "decoders": [replaced("a", "aa")] * 40}},
        {"decoder": {"type": "Strip", "content": "a", "start": 2**60, "stop": 2**60}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"added_tokens": [{"id": 400, "content": "x" * 20_000_000, **ADDED}]},
        {"added_tokens": [{"id": 2**32 - 1, "content": "<x>", **ADDED}]},
        {"added_tokens": CROWD},
        {"added_tokens": [1]},
        {"model": {"type": "WordLevel", "unk_token": "x", "vocab": {"a": 0}}},
        {"model": {"type": "WordPiece", "unk_token": "x", "continuing_subword_prefix": "#", "vocab": {"a": 0}}},
        {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}},
        {"model": []},
        {"model": [[]] * 3_000_000},
    ],
    ids=range(20),
)
def test_a_tokenizer_that_asks_for_too_much_is_refused(parts: dict[str, Any], copy: Path) -> None:
    changed(copy, **parts)
    refused(lambda: TextTokenizer.load(copy).decode(TextTokenizer.load(copy).encode("aaaa" * 10)))


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 2**40},
        {"num_hidden_layers": 2**40},
        {"num_hidden_layers": 10**6},
        {"num_attention_heads": 10**300},
        {"num_key_value_heads": 10**300},
        {"head_dim": 10**300},
        {"vocab_size": 10**300},
        {"vocab_size": -1},
        {"intermediate_size": 10**300},
        {"max_position_embeddings": 10**300},
        {"rope_parameters": "x"},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": ["x"], "factor": 1}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": "a", "mscale_all_dim": "b"}},
        {"rope_parameters": {"rope_type": "yarn", "factor": -2, "mscale": 1, "mscale_all_dim": 1}},
    ],
    ids=range(15),
)
def test_sizes_beyond_any_model_are_refused_before_anything_is_made_of_them(fields: dict[str, Any], copy: Path) -> None:
    path = copy / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    refused(lambda: read_config(path))


@pytest.mark.parametrize("ends", ["x", [["a"]], {"a": 1}, 2**70, -5, [2, 2**70], [None], 1.5, list(range(5000))], ids=range(9))
def test_end_tokens_that_are_no_tokens_are_refused(ends: object, copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    refused(lambda: TextTokenizer.load(copy))


def test_a_file_of_very_many_weights_is_refused(copy: Path) -> None:
    header = json.dumps({f"x{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(50_000)})
    (copy / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header.encode())
    config, vocab_size = read_config(copy / CONFIG)
    refused(lambda: read_weights(copy, config, vocab_size=vocab_size))


# Requests


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"},
        {"type": "string", "pattern": "x{999999999999}"},
        {"type": "object", "patternProperties": {"((a{300}){300})": {"type": "string"}}},
        {"anyOf": [{"type": "array", "items": {"type": "string", "pattern": "(?:(?:[a-z{]{99}b{99}){99}){99}"}}]},
        {"allOf": nested_schema(2000)},
    ],
    ids=range(5),
)
def test_a_schema_that_asks_for_too_much_is_refused(schema: dict[str, Any]) -> None:
    assert schema_fault(schema)


@pytest.mark.parametrize(
    "pattern", [r"^\d{4}-\d{2}-\d{2}$", "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "^[A-Z]{2}.{0,500}$"]
)
def test_patterns_of_dates_and_numbers_are_taken(pattern: str) -> None:
    assert schema_fault({"type": "object", "properties": {"pattern": {"type": "string", "pattern": pattern}}}) is None


# Data


def docx(body: str) -> bytes:
    kind, relation = "application/vnd.openxmlformats-", "http://schemas.openxmlformats.org/"
    content = f"""<Types xmlns="{relation}package/2006/content-types">
<Default Extension="rels" ContentType="{kind}package.relationships+xml"/>
<Default Extension="xml" ContentType="application/xml"/>
<Override PartName="/word/document.xml" ContentType="{kind}officedocument.wordprocessingml.document.main+xml"/></Types>"""
    relations = f"""<Relationships xmlns="{relation}package/2006/relationships"><Relationship Id="a"
Type="{relation}officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>"""
    document = f'<w:document xmlns:w="{relation}wordprocessingml/2006/main"><w:body>{body}</w:body></w:document>'
    with zipfile.ZipFile(written := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("[Content_Types].xml", content), ("_rels/.rels", relations), ("word/document.xml", document)):
            archive.writestr(name, f'<?xml version="1.0"?>{text}')
    return written.getvalue()


def table(rows: str) -> bytes:
    return docx(f"<w:tbl><w:tblGrid/>{rows}</w:tbl>")


PARAGRAPH = "<w:p><w:r><w:t>text</w:t></w:r></w:p>"
WIDE = f'<w:tr><w:tc><w:tcPr><w:gridSpan w:val="2000000000"/></w:tcPr>{PARAGRAPH}</w:tc></w:tr>'
BEFORE = f'<w:tr><w:trPr><w:gridBefore w:val="2000000000"/></w:trPr><w:tc>{PARAGRAPH}</w:tc></w:tr>'
CONTINUED = f"<w:tr><w:tc><w:tcPr><w:vMerge/></w:tcPr>{PARAGRAPH}</w:tc></w:tr>"
LONG = f'<w:tr><w:tc><w:tcPr><w:gridSpan w:val="900"/></w:tcPr><w:p><w:r><w:t>{"x" * 4000}</w:t></w:r></w:p></w:tc></w:tr>'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("wide.docx", table(WIDE)),
        ("before.docx", table(BEFORE)),
        ("continued.docx", table(CONTINUED)),
        ("long.docx", table(LONG * 20)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_of_a_document_that_grows_in_memory_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)

    def read() -> None:
        for row in read_rows([tmp_path / name], set()):
            row.fields()

    refused(read)

"""`run inspect`: samples of what a stage learns from, made by the code that stages run."""

import json
from pathlib import Path
from typing import Any

import pytest

from runner.cli import main

RECIPE = """
name = "look"
[stage.corpus]
kind = "corpus"
sources = [{ name = "both", files = "text.jsonl", where = { keep = true } }]
validation = 0.3
near_duplicates = false
[stage.tokenizer]
kind = "tokenizer"
corpus = "corpus"
vocab_size = 300
[stage.tokens]
kind = "pack"
corpus = "corpus"
tokenizer = "tokenizer"
context = 48
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { hidden_size = 16, layers = 1, heads = 2 }
[stage.chat]
kind = "sft"
model = "base"
context = 40
data = [{ files = "rows.jsonl", prompt = "问：{q}", response = "{a}" }]
"""
ROWS = [
    {"text": "The heart pumps blood through the body.\r\nAlways.", "keep": True},
    {"text": "short", "keep": True},
    {"text": "not chosen by the recipe", "keep": False},
    {"text": "one thing\n" * 60, "keep": True},
    *({"text": f"高血压是一种常见的疾病，第{number}号，需要长期治疗。", "keep": True} for number in range(40)),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("look")
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    rows = [{"q": "什么是高血压", "a": "一种疾病"}, {"q": "why", "a": "long " * 60}, {"q": "no answer"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "look.toml").write_text(RECIPE, encoding="utf-8")
    assert main([str(folder / "look.toml"), "--until", "tokens", "--cache", str(folder / "cache")]) == 0
    return folder / "look.toml"


def inspected(recipe: Path, stage: str, capsys: pytest.CaptureFixture[str], *, code: int = 0) -> str:
    assert main(["inspect", str(recipe), stage, "--count", "4", "--cache", str(recipe.parent / "cache")]) == code
    found = capsys.readouterr()
    return found.err if code else found.out


def test_a_corpus_shows_what_cleaning_does_and_why_rows_are_dropped(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspected(recipe, "corpus", capsys)
    assert "text.jsonl:1  kept" in shown and "before" in shown and "after" in shown
    assert "text.jsonl:2  dropped: too_short" in shown
    assert "text.jsonl:3  dropped: filtered by `where`" in shown
    assert "text.jsonl:4  dropped: repetition" in shown


def test_a_tokenizer_shows_whole_characters_only(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspected(recipe, "tokenizer", capsys)
    assert "300 tokens; special: <|begin|>" in shown
    assert "疗" in shown and "\ufffd" not in shown
    assert "0 of " in shown and "sentences change when" in shown


@pytest.mark.parametrize("stage", ["tokens", "base"])
def test_packed_rows_show_where_documents_end(stage: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspected(recipe, stage, capsys)
    assert "of 48 tokens" in shown and "<|end|>|<|begin|>" in shown


def test_chats_show_their_loss_mask_and_what_is_cut_or_unusable(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspected(recipe, "chat", capsys)
    assert "<|user|>问：什么是高血压<|assistant|>[一种疾病<|end|>]" in shown
    assert "answer cut" in shown
    assert "rows.jsonl:3" in shown and "cannot be used" in shown


def test_a_stage_that_is_not_finished_is_an_error(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = str(recipe.parent / "empty")
    assert main(["inspect", str(recipe), "tokens", "--cache", empty]) == 2
    assert "tokens: expected a finished stage" in capsys.readouterr().err
    assert main(["inspect", str(recipe), "chat", "--cache", empty]) == 2
    assert "expected a finished tokenizer above it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "learned"),
    [
        ({}, ["[Two.<|im_end|>]", "[<think>↵Since 3.↵</think>↵↵Four.<|im_end|>]"]),
        (
            {"reasoning": "none", "learn_empty_think": True},
            ["[<think>↵↵</think>↵↵Two.<|im_end|>]", "↵↵</think>↵↵Four.<|im_end|>]"],
        ),
    ],
)
def test_a_chat_whose_answers_are_learned_by_themselves_is_shown_in_parts(
    tmp_path: Path, fields: dict[str, Any], learned: list[str]
) -> None:
    from chat_templates import HYBRID, tokenizer_with

    from runner.commands.inspect import _chats
    from runner.input_files import InputFile
    from runner.stages.sft import FineTune

    said = [("human", "One?"), ("gpt", "Two."), ("human", "Three?"), ("gpt", "<think>\nSince 3.\n</think>\n\nFour.")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": [{"from": who, "value": text} for who, text in said]}))
    table = {"files": InputFile("rows.jsonl", tmp_path)}
    stage = FineTune.model_validate({"model": "base", "data": [table], "budget": {"steps": 1}, "seed": 1, **fields})
    lines = [line.plain for line in _chats(stage, tokenizer_with(HYBRID), 1)]
    assert [line.partition(", ")[0] for line in lines if line.startswith("rows.jsonl:1")] == [
        "rows.jsonl:1  part 1 of 2",
        "rows.jsonl:1  part 2 of 2",
    ]
    shown = [line for line in lines if "<|im_start|>" in line]
    assert all(line.endswith(end) for line, end in zip(shown, learned, strict=True))

"""The servable models of a recipe, and `run chat` in a pipe with a real model."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_model import random_model

from runner.serving.models import ServableModel

RECIPE = """
name = "talks"
[stage.base]
kind = "checkpoint"
folder = "model"
[stage.corpus]
kind = "corpus"
sources = [{ files = "text.txt" }]
[stage.medical]
kind = "lora"
base = "base"
data = [{ files = "rows.jsonl" }]
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`run` in a folder whose recipe has only `base` finished."""
    folder = tmp_path_factory.mktemp("talks")
    random_model(folder / "model", ["what is it? 是什么"])
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    (folder / "text.txt").write_text("text", encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")

    def run(*words: str, text: str = "", terminal: int | None = None) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "runner.cli", *words, *([] if "--cache" in words else ["--cache", "cache"])]
        source: dict[str, Any] = {"input": text} if terminal is None else {"stdin": terminal}
        return subprocess.run(command, cwd=folder, **source, capture_output=True, text=True, timeout=120, check=False)

    nothing = run("chat", "recipe.toml")
    assert nothing.returncode == 2 and "expected a finished model, got none" in nothing.stderr
    assert run("recipe.toml", "--until", "base").returncode == 0
    return run


@pytest.mark.parametrize(("text", "threads"), [(None, "3"), ("2", "2")])
def test_a_model_uses_the_cores_of_a_run_unless_the_environment_names_threads(
    text: str | None, threads: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("llm.inference.chat_session.ChatSession", lambda *paths, **how: None)
    monkeypatch.setenv("STOCKPOT_CORES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", text or "")
    if text is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    ServableModel("base", tmp_path).open()
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_each_line_of_a_pipe_is_a_message(ask: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    words = ("chat", "recipe.toml", "--temperature", "0", "--max-new-tokens", "5")
    once = ask(*words, text="what is it?\n")
    assert once.returncode == 0, once.stderr
    again = ask(*words, text="what is it?\n/new\n\nwhat is it?\n/exit\nnot read\n")
    assert again.stdout == once.stdout * 2, "/new starts over, and greedy answers repeat"


def test_a_slash_command_is_not_sent_to_the_model(ask: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    keyboard, terminal = pty.openpty()
    os.write(keyboard, b"/help\n/exit\n")
    message = ask("chat", "recipe.toml", terminal=terminal)
    assert message.returncode == 0 and message.stderr.count("/new starts a new conversation") == 2
    assert message.stdout.split() == [">", ">"]


@pytest.mark.long
def test_a_compiled_model_gives_the_same_answer_and_its_code_is_cached(
    ask: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it where it has compiled
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    words = ("chat", "recipe.toml", "--temperature", "0", "--max-new-tokens", "12", "--cache", str(tmp_path))
    ask("recipe.toml", "--until", "base", "--cache", str(tmp_path))
    plain, compiled = ask(*words, text="what is it?\n"), ask(*words, "--compile", text="what is it?\n")
    assert (compiled.returncode, compiled.stdout) == (0, plain.stdout), compiled.stderr
    assert any((tmp_path / "user" / "stockpot" / "compiled").rglob("*.so"))


def test_only_finished_models_are_servable(ask: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    for stage, message in (
        ("corpus", "makes Corpus; finished models: base"),
        ("medical", "expected a finished model, got the state 'run'"),
        ("bas", "did you mean 'base'"),
    ):
        refused = ask("chat", "recipe.toml", stage)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr

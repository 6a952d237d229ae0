"""A small recipe of corpus, tokenizer and tokens, in a folder with its data and a cache of its own."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from runner.cli import main

RECIPE = """
name = "small"
[stage.corpus]
kind = "corpus"
sources = [{ files = "text.jsonl", name = "text" }]
validation = 0.2
[stage.tokenizer]
kind = "tokenizer"
corpus = "corpus"
vocab_size = 300
[stage.tokens]
kind = "pack"
corpus = "corpus"
tokenizer = "tokenizer"
context = 32
"""
WORDS = [
    "kidney",
    "liver",
    "heart",
    "lung",
    "brain",
    "blood",
    "bone",
    "skin",
    "nerve",
    "muscle",
    "fever",
    "pain",
    "rash",
    "stroke",
]
ALL_CACHED = {"corpus": "cached", "tokenizer": "cached", "tokens": "cached"}


class Folder:
    """A recipe with its data and a cache of its own.

    What runs, runs in a process of its own, as a user's does. What is only asked of the plan is asked in this process, which
    takes a tenth of the time.
    """

    def __init__(self, root: Path) -> None:
        """The folder `root`, filled unless it has a recipe already."""
        self.root, self.recipe, self.cache = root, root / "recipe.toml", root / "cache"
        if not self.recipe.exists():
            root.mkdir(parents=True, exist_ok=True)
            self.write(RECIPE)
            self.documents([f"{a} {b} and {a} of the {b}, {i}." for i, a in enumerate(WORDS) for b in WORDS])

    def write(self, text: str) -> None:
        self.recipe.write_text(text, encoding="utf-8")

    def documents(self, texts: list[str]) -> None:
        lines = [json.dumps({"text": text}) for text in texts]
        (self.root / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "runner.cli", *words]

    def call(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            env={**os.environ, "STOCKPOT_CACHE": str(self.cache), **environment},
        )

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.call("run", str(self.recipe), *options)

    def states(self, *options: str) -> dict[str, str]:
        code, plan = self._asked("plan", "--json", *options)
        assert code == 0
        return {stage["name"]: stage["state"] for stage in json.loads(plan)["stages"]}

    def artifact(self, stage: str) -> Path:
        code, path = self._asked("path", stage)
        assert code == 0
        return Path(path.strip())

    def digest(self, stage: str) -> str:
        return str(json.loads((self.artifact(stage) / "record.json").read_text())["digest"])

    def _asked(self, verb: str, *options: str) -> tuple[int, str]:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = main([verb, str(self.recipe), *options, "--cache", str(self.cache)])
        return code, said.getvalue()

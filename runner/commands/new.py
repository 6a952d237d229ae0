"""`run new`: five questions, and a commented recipe that validates and plans."""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner.errors import RecipeError
from runner.recipe.recipe import load_recipe
from runner.resources import gpu_count

Language = Literal["en", "zh", "both"]
Hardware = Literal["cpu", "gpu"]
# (parameters, hidden size, layers, heads, vocabulary, context), the smallest first. Heads have 32 to 64 channels.
SHAPES = (
    (2.6e6, 192, 4, 6, 4096, 256),
    (12e6, 320, 6, 10, 6144, 512),
    (29e6, 512, 8, 8, 6144, 512),
    (110e6, 768, 12, 12, 16384, 1024),
    (215e6, 1024, 18, 16, 6144, 512),
)
# Floating-point operations per second that a training reaches, as an order of magnitude: two cores with AVX512-BF16, one GPU.
SPEED = {"cpu": 1.6e11, "gpu": 2e14}
PRETRAINING = 0.5  # of the time; the rest is for chat, adapter and evaluation
LEAST_TOKENS = 1.5  # per parameter: below it a smaller model is better off
GENERAL = {"en": "data/general_en-*.jsonl.gz", "zh": "data/general_zh.jsonl.gz"}
GENERAL_TEST = {"en": "data/general_en_val.jsonl.gz", "zh": "data/general_zh_val.jsonl.gz"}
CHAT = {"en": "data/chat_en.jsonl.gz", "zh": "data/chat_zh.jsonl.gz"}
PROMPTS = ("prompt", "question", "instruction", "input")  # fields that are asked, the likeliest first
RESPONSES = ("response", "answer", "output", "label")


@dataclass(frozen=True)
class Answers:
    """What a person said."""

    name: str
    language: Language
    data: str | None  # path of the domain's rows, as the recipe writes it; None: a general model only
    fields: Sequence[str]  # of the first row of it
    hardware: Hardware
    minutes: float
    repo: str | None  # "owner/name"


def recipe_text(answers: Answers) -> str:
    """The whole recipe, commented; it validates wherever the shipped `data/` lies beside it."""
    languages = ["en", "zh"] if answers.language == "both" else [answers.language]
    flops = answers.minutes * 60 * PRETRAINING * SPEED[answers.hardware]
    shape = max((s for s in SHAPES if flops / (6 * s[0]) >= LEAST_TOKENS * s[0]), default=SHAPES[0])
    parameters, hidden, layers, heads, vocabulary, context = shape
    tokens = max(200_000, int(flops / (6 * parameters) // 100_000 * 100_000))
    batch = 2048 if parameters < 1e7 else 8192 if parameters < 1e8 else 131_072
    sources = ",\n  ".join(f'{{ name = "general-{tag}", files = "{GENERAL[tag]}", language = "{tag}" }}' for tag in languages)
    chats = ", ".join(f'{{ files = "{CHAT[tag]}" }}' for tag in languages)
    tests = ",\n  ".join(f'{{ name = "general-{tag}", task = "text", files = "{GENERAL_TEST[tag]}" }}' for tag in languages)
    last = "release" if answers.data else "chat"
    repo = f"repo = {_quoted(answers.repo)}" if answers.repo else '# repo = "owner/name"    # on the Hub; then: hf auth login'
    return f"""#:schema recipe.schema.json
# Hardware: {"CPU cores" if answers.hardware == "cpu" else "one GPU"}.
# Time: made for about {answers.minutes:g} minutes; `run plan` tells what this machine will need.
# Result: not yet run.
name = {_quoted(answers.name)}
description = ""        # one sentence on what comes out, for the model card
seed = 42

# The text that the model reads first. More and better text is what helps a model most: add sources of your own here.
[stage.corpus]
kind = "corpus"
sources = [
  {sources},
]

[stage.tokenizer]
kind = "tokenizer"
corpus = "corpus"
vocab_size = {vocabulary}

[stage.tokens]
kind = "pack"
corpus = "corpus"
tokenizer = "tokenizer"
context = {context}

# A model of about {parameters / 1e6:.3g}M parameters from nothing; a larger one wants more tokens than the time allows.
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = {{ hidden_size = {hidden}, layers = {layers}, heads = {heads} }}
batch_tokens = {batch}
budget = {{ tokens = {tokens:_} }}
schedule = {{ kind = "wsd", learning_rate = 1e-2, warmup_steps = 50, decay_fraction = 0.4 }}
optimizer = {{ kind = "muon", muon_learning_rate = 0.02 }}

# It learns to answer.
[stage.chat]
kind = "sft"
model = "base"
data = [{chats}]
batch_tokens = {2 * batch}
budget = {{ tokens = {max(100_000, tokens // 10):_} }}
schedule = {{ kind = "linear", learning_rate = 1e-3, warmup_steps = 10 }}
{_domain(answers, batch=batch, tokens=tokens) if answers.data else ""}
[stage.scores]
kind = "evaluate"
model = "{last}"
tasks = [
  {tests},
]
# gates = [{{ score = "general-{languages[0]}.bits_per_byte", at_most = 2.0 }}]    # nothing is published while one fails

[stage.publish]
kind = "publish"
model = "{last}"
scores = ["scores"]
license = "other"       # as the Hub names it: apache-2.0, mit, cc-by-4.0
{repo}
"""


def _domain(answers: Answers, *, batch: int, tokens: int) -> str:
    prompt, response = _template(answers.fields)
    wording = f", prompt = {_quoted(prompt)}, response = {_quoted(response)}"
    plain = (prompt, response) == ("{prompt}", "{response}")
    return f"""
# Your data, as a low-rank adapter: prompts that are read, responses that are learned.
[stage.domain]
kind = "lora"
base = "chat"
r = 8
alpha = 16
data = [{{ files = {_quoted(str(answers.data))}{"" if plain else wording} }}]
batch_tokens = {batch}
budget = {{ tokens = {max(100_000, tokens // 2):_} }}
schedule = {{ kind = "linear", learning_rate = 5e-3, warmup_steps = 20 }}

[stage.release]
kind = "merge"
base = "chat"
adapters = ["domain"]
"""


def _template(fields: Sequence[str]) -> tuple[str, str]:
    """How a row becomes prompt and response: by well-known names of fields, else the first and the last."""
    prompt = next((name for name in PROMPTS if name in fields), fields[0] if fields else "prompt")
    response = next((name for name in RESPONSES if name in fields and name != prompt), fields[-1] if fields else "response")
    return f"{{{prompt}}}", f"{{{response}}}"


def _quoted(text: str) -> str:
    """As a TOML string: JSON's escapes are among TOML's."""
    return json.dumps(text, ensure_ascii=False)


SHIPPED = Path(__file__).parents[2] / "recipes"
LANGUAGES: tuple[Language, ...] = ("en", "zh", "both")
HARDWARE: tuple[Hardware, ...] = ("cpu", "gpu")


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="the TOML file to write; beside the shipped data if it names no folder"
    )
    sub.add_argument("--language", choices=LANGUAGES, help="of the model")
    sub.add_argument("--data", metavar="FILE", help="rows of your domain (jsonl, csv or parquet); '' for none")
    sub.add_argument("--hardware", choices=HARDWARE, help="to train on")
    sub.add_argument("--minutes", type=float, metavar="N", help="that the whole may take")
    sub.add_argument("--repo", metavar="OWNER/NAME", help="to publish as on the Hub; '' for nowhere")


def main(options: argparse.Namespace) -> int:
    """Asks five questions (language, domain data, hardware, time, where to publish) and writes a recipe."""
    path: Path = options.recipe if options.recipe.parent != Path() else SHIPPED / options.recipe
    path = path.with_suffix(".toml")
    if path.exists():
        raise RecipeError(f"{path}: is there already; expected the name of a new file")
    if not re.fullmatch(r"[\w.-]+", path.stem):
        raise RecipeError(f"{path.name}: expected a name of letters, digits, '.', '-' and '_'")
    best: Hardware = "gpu" if gpu_count() else "cpu"
    language = _answer(options.language, "language of the model", LANGUAGES, "en")
    data = _answer(options.data, "file with rows of your domain (empty for none)", None, "", check=_is_file)
    hardware = _answer(options.hardware, "hardware to train on", HARDWARE, best)
    minutes = _answer(options.minutes, "minutes that the whole may take", None, "30", check=_minutes)
    repo = _answer(options.repo, "owner/name to publish as on the Hub (empty for nowhere)", None, "", check=_repo)
    answers = Answers(
        name=path.stem,
        language=language,  # type: ignore[arg-type]  # one of LANGUAGES
        data=os.path.relpath(Path(data).resolve(), path.parent.resolve()) if data else None,
        fields=_fields(Path(data)) if data else (),
        hardware=hardware,  # type: ignore[arg-type]  # one of HARDWARE
        minutes=float(minutes),
        repo=repo or None,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe_text(answers), encoding="utf-8")
    outside = [Path(data).resolve().parent] if data else []
    load_recipe(path, allowed=outside)
    is_inside = not data or Path(data).resolve().is_relative_to(path.parent.resolve())
    allow = "" if is_inside else f" --allow-path {shlex.quote(str(outside[0]))}"
    named = shlex.quote(os.path.relpath(path))
    print(f"wrote {path}\nlook at it, then:\n  run plan {named}{allow}\n  run {named}{allow}")
    return 0


def _answer(
    given: object,
    question: str,
    choices: tuple[str, ...] | None,
    default: str,
    check: Callable[[str], str | None] | None = None,
) -> str:
    """What the command line says, else what a person answers, else (where nobody can be asked) the default."""
    fault = check or (lambda text: None if not choices or text in choices else f"expected one of {', '.join(choices)}")
    if given is not None or not sys.stdin.isatty():
        text = default if given is None else str(given)
        if found := fault(text):
            raise RecipeError(f"{question}: {found}")
        return text
    shown = f" ({' / '.join(choices)})" if choices else ""
    while True:
        text = input(f"{question}{shown} [{default}]: ").strip() or default
        found = fault(text)
        if found is None:
            return text
        print(f"  {found}")


def _is_file(text: str) -> str | None:
    return None if not text or Path(text).is_file() else f"expected a file, got none at {text}"


def _minutes(text: str) -> str | None:
    try:
        return None if 0 < float(text) < 1e6 else f"expected more than 0, got {text}"
    except ValueError:
        return f"expected a number, got {text!r}"


def _repo(text: str) -> str | None:
    return None if not text or re.fullmatch(r"([\w.-]+/)?[\w.-]+", text) else f"expected owner/name, got {text!r}"


def _fields(path: Path) -> list[str]:
    """The fields of the first row."""
    from llm.errors import InputError
    from llm.text.readers import field_names

    try:
        return field_names(path)
    except InputError as error:
        raise RecipeError(str(error)) from error

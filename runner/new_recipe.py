"""A recipe from five answers: language, domain data, hardware, time, where to publish. Answers in, TOML out.

Which size a training of so many minutes deserves is a rule of thumb; `run plan` tells what it will cost.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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

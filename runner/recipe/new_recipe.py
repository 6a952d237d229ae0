"""The recipe that `run new` writes: sizes that fit the time and the hardware, filled into a commented template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Language = Literal["en", "zh", "both"]
Hardware = Literal["cpu", "gpu"]
TEMPLATE = Path(__file__).parents[1] / "pages" / "new_recipe.toml.jinja"


class Shape(NamedTuple):
    """A model that is worth training; heads have 32 to 64 channels."""

    parameters: float
    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    context: int


SHAPES = (  # the smallest first
    Shape(2.6e6, 192, 4, 6, 4096, 256),
    Shape(12e6, 320, 6, 10, 6144, 512),
    Shape(29e6, 512, 8, 8, 6144, 512),
    Shape(110e6, 768, 12, 12, 16384, 1024),
    Shape(215e6, 1024, 18, 16, 6144, 512),
)
# Floating-point operations per second of a training, as an order of magnitude: two cores with AVX512-BF16, one GPU.
SPEED = {"cpu": 1.6e11, "gpu": 2e14}
PRETRAINING = 0.5  # of the time; the rest is for chat, adapter and evaluation
MIN_TOKENS = 1.5  # per parameter; with fewer, a smaller model is better
GENERAL = {"en": "data/general_en-*.jsonl.gz", "zh": "data/general_zh.jsonl.gz"}
HELD_OUT = {"en": "data/general_en_val.jsonl.gz", "zh": "data/general_zh_val.jsonl.gz"}
CHAT = {"en": "data/chat_en.jsonl.gz", "zh": "data/chat_zh.jsonl.gz"}
PROMPTS = ("prompt", "question", "instruction", "input")  # names of fields, the most likely first
RESPONSES = ("response", "answer", "output", "label")


@dataclass(frozen=True)
class Answers:
    """What the user chose."""

    name: str
    language: Language
    data: str | None  # path of the domain's rows, relative to the recipe; None: a general model only
    fields: Sequence[str]  # of the first row of it
    hardware: Hardware
    minutes: float
    repo: str | None  # "owner/name"


def recipe_text(answers: Answers) -> str:
    """The whole recipe with comments; it validates wherever the shipped `data/` lies beside it."""
    from jinja2 import Environment, StrictUndefined

    flops = answers.minutes * 60 * PRETRAINING * SPEED[answers.hardware]
    shape = max((s for s in SHAPES if flops / (6 * s.parameters) >= MIN_TOKENS * s.parameters), default=SHAPES[0])
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["toml"] = lambda text: json.dumps(text, ensure_ascii=False)  # JSON's escapes are among TOML's
    environment.filters["grouped"] = lambda number: f"{number:_}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=answers.name,
        languages=["en", "zh"] if answers.language == "both" else [answers.language],
        hardware=answers.hardware,
        minutes=f"{answers.minutes:g}",
        shape=shape,
        millions=f"{shape.parameters / 1e6:.3g}",
        batch=2048 if shape.parameters < 1e7 else 8192 if shape.parameters < 1e8 else 131_072,
        tokens=max(200_000, int(flops / (6 * shape.parameters) // 100_000 * 100_000)),
        general=GENERAL,
        chat=CHAT,
        held_out=HELD_OUT,
        data=answers.data,
        template=_template(answers.fields),
        model="release" if answers.data else "chat",
        repo=answers.repo,
    )


def _template(fields: Sequence[str]) -> tuple[str, str]:
    """How a row becomes prompt and response: by common names of fields, else the first and the last field."""
    prompt = next((name for name in PROMPTS if name in fields), fields[0] if fields else "prompt")
    response = next((name for name in RESPONSES if name in fields and name != prompt), fields[-1] if fields else "response")
    return f"{{{prompt}}}", f"{{{response}}}"

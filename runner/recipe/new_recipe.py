"""The recipe that `run new` writes: sizes that fit the time, the hardware and the data, filled into a commented template."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from runner.recipe.training_work import training_work

Hardware = Literal["cpu", "gpu"]
Kind = Literal["labels", "pairs", "chats", "preferences", "documents"]
TEMPLATE = Path(__file__).parents[1] / "pages" / "new_recipe.toml.jinja"


class Shape(NamedTuple):
    """A model that is worth training; heads have 32 to 64 channels."""

    parameters: float
    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    context: int


SHAPES = (  # the smallest first; the first one is to try a recipe out
    Shape(0.2e6, 64, 2, 2, 1024, 128),
    Shape(1.3e6, 128, 4, 4, 4096, 256),
    Shape(2.6e6, 192, 4, 6, 4096, 256),
    Shape(12e6, 320, 6, 10, 6144, 512),
    Shape(29e6, 512, 8, 8, 6144, 512),
    Shape(110e6, 768, 12, 12, 16384, 1024),
    Shape(215e6, 1024, 18, 16, 6144, 512),
)
# Work of a training per second where it was not measured, as an order of magnitude: two cores with AVX512-BF16, one GPU.
SPEED = {"cpu": 1.6e11, "gpu": 2e14}
# Of the time: at most for text, tokenizer, starts and evaluation, which take so many seconds; and for learning the rows, if
# there are many. Pretraining has the rest.
OTHER, OTHER_SECONDS, TUNING = 0.25, 90.0, 0.3
FEWEST_STEPS, MOST_EPOCHS = 200, 60  # of learning rows: few of them are learned often
MIN_TOKENS = 1.5  # per parameter; with fewer, a smaller model is better
LONGEST = {"cpu": 1024, "gpu": 2048}  # positions of a row
CHARACTERS = {"zh": 1.2, "en": 3.5}  # that are a token of a vocabulary of 4,096
GENERAL = {"en": "general_en-*.jsonl.gz", "zh": "general_zh.jsonl.gz"}  # of the shipped data
HELD_OUT = {"en": "general_en_val.jsonl.gz", "zh": "general_zh_val.jsonl.gz"}
CHAT = {"en": "chat_en.jsonl.gz", "zh": "chat_zh.jsonl.gz"}
GENERAL_BYTES = {"en": 8.4e6, "zh": 5.2e6}  # of text
SMALL = {"en": "HuggingFaceTB/SmolLM2-135M", "zh": "Qwen/Qwen2.5-0.5B"}  # models to start from
BASE_PARAMETERS = 1.35e8  # of a model to start from, if it is one of the small ones above
FEWEST_ROWS = 3  # of which one can be held out
MOST_LABELS = 50  # that are written into a recipe


@dataclass(frozen=True)
class Rows:
    """The user's rows, and how they are used."""

    files: str  # relative to the recipe
    kind: Kind
    prompt: str = ""  # a template; of documents, the text
    response: str = ""  # a template
    text: str = ""  # the field that rows are grouped by
    label: str = ""  # the field that the rows are split by
    messages: str = ""
    is_known: bool = False  # of chats: whether the names of the fields say how rows are read
    labels: Sequence[str] = ()
    count: int = 0
    is_unequal: bool = False  # whether a label has several times the rows of another
    several: str = ""  # rows have several labels: "list", or what separates them
    characters: int = 0  # of half of the rows at most
    long_characters: int = 0  # of 95% of them
    bad: int = 0  # that cannot be used
    read: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """What the user chose."""

    name: str
    language: str
    rows: Rows | None  # None: a general model only
    hardware: Hardware
    minutes: float
    repo: str | None = None  # "owner/name" to publish to
    base: str | None = None  # a model to start from: a folder, or "owner/name" on the Hub; None: from nothing
    shipped: str | None = "data"  # the folder with Stockpot's own text, relative to the recipe
    speed: float | None = None  # work per second of the hardware (`runner.recipe.training_work`), if it was measured


def recipe_text(answers: Answers) -> str:
    """The whole recipe with comments; it validates wherever its data lies beside it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["toml"] = lambda text: json.dumps(text, ensure_ascii=False)  # JSON's escapes are among TOML's
    environment.filters["grouped"] = lambda number: f"{number:_}"
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_settings(answers))
    return text.rstrip() + "\n"


def _settings(answers: Answers) -> dict[str, Any]:
    """All that the template fills in."""
    seconds, rows = answers.minutes * 60, answers.rows
    speed = answers.speed or SPEED[answers.hardware]
    seconds -= min(OTHER * seconds, OTHER_SECONDS)
    fitting = (
        s for s in SHAPES if 0.6 * seconds * speed / _per_token(s, answers.hardware, _batch(s)) >= MIN_TOKENS * s.parameters
    )
    shape = max(fitting, default=SHAPES[0])
    languages = ["en", "zh"] if answers.language == "both" else ["zh" if answers.language == "zh" else "en"]
    context = shape.context if rows is None else _context(rows, shape, languages[0], answers.hardware)
    batch = max(_batch(shape), 4 * context)
    tune: dict[str, Any] | None = None
    if rows:
        learner = shape if answers.base is None else shape._replace(parameters=BASE_PARAMETERS)
        most = (TUNING if answers.base is None else 1.0) * seconds * speed
        tune = _tuning(rows, context, languages[0], work=most, hardware=answers.hardware, shape=learner)
        tune["learning_rate"] = "5e-4" if answers.base else "2e-3"
        if rows.kind != "documents":
            seconds -= tune["all_tokens"] * _per_token(learner, answers.hardware, tune["batch"]) / speed
    else:
        seconds *= 1 - TUNING / 3  # answering general questions
    tokens = max(100_000, int(seconds * speed / _per_token(shape, answers.hardware, batch) // 100_000 * 100_000))
    return {
        "name": answers.name,
        "languages": languages if answers.shipped is not None else [],
        "tag": None if answers.language == "both" else answers.language,
        "shipped": answers.shipped,
        "general": GENERAL,
        "held_out": HELD_OUT,
        "chat": CHAT,
        # As much general text as is read once, and at least enough for the vocabulary.
        "weight": {
            one: min(1.0, round(max(4.5 * tokens / len(languages), 300 * shape.vocab_size) / GENERAL_BYTES[one] + 0.005, 2))
            for one in languages
        },
        "hardware": answers.hardware,
        "minutes": f"{answers.minutes:g}",
        "shape": shape._replace(context=context),
        "millions": f"{shape.parameters / 1e6:.3g}",
        "batch": batch,
        "tokens": tokens,
        "rows": rows,
        "tune": tune,
        # Documents that do not fit are read piece by piece.
        "windows": rows is not None and rows.kind == "labels" and rows.long_characters / CHARACTERS[languages[0]] > context,
        "base": answers.base,
        "base_is_folder": answers.base is not None and Path(answers.base).is_dir(),
        "repo": answers.repo,
        "splits": rows is not None and rows.count >= FEWEST_ROWS,
        "mixes": answers.minutes >= 5,  # reading other chats takes a minute
        "most_labels": MOST_LABELS,
    }


def _context(rows: Rows, shape: Shape, language: str, hardware: Hardware) -> int:
    """The positions that hold 95% of the rows, in the range of what the hardware trains well."""
    needed = rows.long_characters / CHARACTERS[language] + 32
    most = min(LONGEST[hardware], max(shape.context, 512))
    return max(128, min(most, 1 << (int(needed) - 1).bit_length())) if rows.kind != "documents" else shape.context


def _batch(shape: Shape) -> int:
    """Tokens of a step of pretraining."""
    steps = ((1e6, 1024), (1e7, 2048), (1e8, 8192))
    return next((batch for most, batch in steps if shape.parameters < most), 131_072)


def _per_token(shape: Shape, hardware: Hardware, batch: int) -> float:
    """The work of a training for a token of a batch of that many."""
    return training_work(6 * shape.parameters, 1, steps=1 / batch, gpu=hardware == "gpu")


def _tuning(rows: Rows, context: int, language: str, *, work: float, hardware: Hardware, shape: Shape) -> dict[str, Any]:
    """Epochs and steps that fit the number of rows and the work: many epochs over few rows."""
    length = rows.characters / CHARACTERS[language] + 8
    # Windows of documents to classify are all learned; of other rows what does not fit is cut.
    in_epoch = max(1.0, 0.8 * rows.count * (length if rows.kind == "labels" else min(context, length)))
    steps_in_epoch = 24  # of a batch that is neither below 2^8 nor above 2^13 tokens
    batch = max(context, 1 << max(8, min(13, int(in_epoch / steps_in_epoch).bit_length() - 1)))
    epochs = next((number for number, most in ((12, 500), (8, 2000), (4, 10_000), (2, 100_000)) if rows.count < most), 1)
    if rows.kind != "documents":
        epochs = max(epochs, min(MOST_EPOCHS, math.ceil(FEWEST_STEPS * batch / in_epoch)))
    affordable = max(work / _per_token(shape, hardware, batch), FEWEST_STEPS * batch)
    epochs = max(1, min(epochs, int(affordable / in_epoch)))
    tokens = int(affordable // 1000 * 1000) if affordable < in_epoch else None
    return {"epochs": epochs, "tokens": tokens, "batch": batch, "all_tokens": tokens or epochs * in_epoch}

"""The form of a record: strict types for everything that planning reads, and bounds for the rest. A record may come from
another machine, so nothing is taken from it before it was compared with this.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from runner.artifacts import RECORD

DEEPEST = 40  # levels of tables and lists
MOST_DIGITS = 300  # of a whole number, so that it is a float too
LONGEST_NAME = 255  # bytes of each part of a path


def _plain_path(name: str) -> str:
    """The path of a file inside an artifact, unchanged; ValueError for one that may lead out of it."""
    parts = name.split("/")
    if not all(name.isprintable() and part and not part.startswith(".") and "\\" not in part for part in parts):
        raise ValueError("expected the path of a file inside the artifact, got another")
    if name == RECORD or any(len(part.encode()) > LONGEST_NAME for part in parts) or len(name.encode()) > 4 * LONGEST_NAME:
        raise ValueError("expected the path of a file inside the artifact, got another")
    return name


def _apart(files: dict[str, str]) -> dict[str, str]:
    """The files, unchanged; ValueError if one of them is also a folder of another."""
    folders = {name[:place] for name in files for place, character in enumerate(name) if character == "/"}
    if both := folders & files.keys():
        raise ValueError(f"expected files, but {min(both)!r} is a folder too")
    return files


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, Field(max_length=1000)]
Files = Annotated[dict[Annotated[str, AfterValidator(_plain_path)], Sha256], AfterValidator(_apart)]
Count = Annotated[int | float, Field(ge=0, allow_inf_nan=False)]
Pair = Annotated[list[int | float], Field(min_length=2, max_length=2)]


class _Table(BaseModel):
    """A table with fields of known types; others are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)


class _Input(_Table):
    kind: Word
    key: Sha256
    digest: Sha256


class _Tokens(_Table):
    tokens: Count


class _Task(_Table):
    examples: Word | None = None


class _Evaluation(_Table):
    """The metrics of an evaluation, of which gates are judged."""

    scores: dict[str, int | float]
    intervals: dict[str, Pair] = {}
    replicates: dict[str, str] = {}
    tasks: dict[str, _Task] = {}


class _Packing(_Table):
    train: _Tokens


class _Training(_Table):
    """The metrics of a training, of which costs are estimated."""

    tokens: Count
    steps: Annotated[Count, Field(gt=0)]
    first_step: Count = 0
    seconds: Count = 0
    flops: Count | None = None
    parameters: Count = 0
    peak_memory_bytes: Count | None = None


METRICS: dict[str, type[BaseModel]] = {
    "evaluate": _Evaluation,
    "pack": _Packing,
    **dict.fromkeys(("pretrain", "trunk", "sft", "lora", "dpo"), _Training),
}


class _Hardware(_Table):
    cores: Count | None = None
    gpus: list[Any] | dict[str, Any] | int | None = None


class _Record(_Table):
    """All that is known of a finished stage."""

    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
    key: Sha256
    digest: Sha256
    files: Files
    attachments: Files
    identity: dict[str, Any]
    inputs: dict[str, _Input]
    metrics: dict[str, Any]
    finished: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT[\d:.+Z-]{1,30}$")]
    seconds: Count
    recipe: Word | None = None
    stage: Word | None = None
    code: Word | None = None
    started: Word | None = None
    processes: Count | None = None
    sizes: dict[str, Annotated[int, Field(ge=0)]] | None = None  # bytes of each file
    beginning: _Input | None = None
    hardware: _Hardware | None = None
    versions: dict[str, Word | None] | None = None
    curves: dict[str, list[Pair]] | None = None


def whole_number(text: str) -> int:
    """A whole number of JSON; ValueError for one that is too large to be a float."""
    if len(text) > MOST_DIGITS:
        raise ValueError(f"expected at most {MOST_DIGITS} digits, got {len(text)}")
    return int(text)


def form_fault(data: Any, text: bytes) -> str | None:
    """What is wrong with the form of a record, in a few words; None for a good one. `text` is the JSON that it was read
    from."""
    plain = text.count(b"{") + text.count(b"[") <= DEEPEST and b"\\u" not in text  # so that a plan is fast
    if not plain and (fault := _plain_fault(data)):
        return fault
    try:
        record = _Record.model_validate(data)
        if form := METRICS.get(record.kind):
            form.model_validate(record.metrics)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"])[:100]
        return f"{place.encode('unicode_escape').decode()}: {first['msg'][:100]}"
    return None


def _plain_fault(data: Any) -> str | None:
    """Whether a value of JSON is too deep, or has texts that are none elsewhere."""
    waiting = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            return f"more than {DEEPEST} levels"
        match value:
            case dict():
                waiting += [(part, depth + 1) for pair in value.items() for part in pair]
            case list():
                waiting += [(part, depth + 1) for part in value]
            case str() if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                return "half of a character"
    return None

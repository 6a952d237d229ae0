"""What a training of a plan computes with: its model, the adapter, and how long its rows are, as far as planning can know.

A model is known by the architecture that the recipe writes, or by the config.json of a checkpoint: in the cache, or still in
the folder that it will be imported from. Files are read at their beginning only.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.errors import InputError
from llm.models import architectures, from_transformers
from runner.artifacts import Checkpoint
from runner.graph import edges
from runner.planning.plan import Plan
from runner.stage import Stage
from runner.stages.checkpoint import CONFIGS, ImportCheckpoint
from runner.stages.dpo import LearnPreferences
from runner.stages.fields.adapter import AdapterFields
from runner.stages.fields.chat_training import PackedTraining
from runner.stages.lora import TrainAdapter
from runner.stages.pack import Pack
from runner.stages.pretrain import Pretraining
from runner.stages.tokenizer import TrainTokenizer

if TYPE_CHECKING:
    from llm.models.interface import ModelConfig

SAMPLE, LARGEST_SAMPLE = 1 << 18, 1 << 24  # bytes of a file, and of what is decompressed of them
UNPACKED = 3.0  # bytes of text per byte of a .zst or .parquet file
BYTES_PER_TOKEN = 3.0  # of a line that holds the longest chat, its field names included
SHORTEST_ROW = 64  # positions, as in `llm.data.chat_dataset`, which is slow to import
USUAL_ROW = 1024  # positions, where the lines of files cannot be seen


@dataclass(frozen=True)
class Model:
    """An architecture with its sizes, and its vocabulary."""

    config: "ModelConfig"
    vocab_size: int
    context: int  # longest sequence


@dataclass(frozen=True)
class Shape:
    """The sizes of a training that its cost depends on."""

    parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    flops_per_token: float  # forward and backward
    row: int  # positions


def shape_of_stage(plan: Plan, name: str) -> Shape | None:
    """The sizes of the training `name`; None where its model is not known yet."""
    model = model_of_stage(plan, name)
    if model is None:
        return None
    row, architecture = row_length(plan, name, model), architectures()[model.config.name]
    return Shape(
        parameters=architecture.parameter_count(model.config, vocab_size=model.vocab_size),
        layers=model.config.layers,
        hidden_size=model.config.hidden_size,
        vocab_size=model.vocab_size,
        flops_per_token=architecture.flops_per_token(model.config, vocab_size=model.vocab_size, context=row),
        row=row,
    )


def model_of_stage(plan: Plan, name: str) -> Model | None:
    """The model that a stage makes or trains."""
    stage, path = plan.recipe.stages[name], plan.entries[name].path
    if isinstance(stage, Pretraining) and stage.architecture is not None:
        return _fresh(plan, stage, stage.architecture)
    if path is not None and isinstance(stage.makes(path), Checkpoint):
        return _written(Checkpoint(path).config)
    if isinstance(stage, ImportCheckpoint):
        return model_of_folder(Path(stage.folder.pattern)) if stage.folder is not None else None
    bases = [str(ref) for _, ref in edges(stage) if issubclass(ref.artifact, Checkpoint)]
    return model_of_stage(plan, bases[0]) if bases else None


def _fresh(plan: Plan, stage: Pretraining, architecture: "ModelConfig") -> Model | None:
    pack = plan.recipe.stages[stage.tokens]
    if not isinstance(pack, Pack):
        return None
    tokenizer = plan.recipe.stages[pack.tokenizer]
    context = architecture.context or pack.context
    if isinstance(tokenizer, TrainTokenizer):
        return Model(architecture, tokenizer.vocab_size, context)
    other = model_of_stage(plan, pack.tokenizer)
    return None if other is None else Model(architecture, other.vocab_size, context)


def model_of_folder(folder: Path) -> Model | None:
    """The model in a folder as Transformers saves it; None where it is not supported."""
    return _written(folder / CONFIGS[0])


def _written(path: Path) -> Model | None:
    """The model that a config.json describes; None where it is not supported, which its stage will say."""
    with suppress(OSError, ValueError, KeyError, AttributeError, InputError):
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config = from_transformers(found, dropout=0.0)
        return Model(config, int(found["vocab_size"]), config.resolved_context)
    return None


def row_length(plan: Plan, name: str, model: Model) -> int:
    """Positions of a row: those of packed text, or as many as the longest chat seems to need."""
    stage = plan.recipe.stages[name]
    tokens = getattr(stage, "tokens", None)
    if isinstance(tokens, str) and isinstance(pack := plan.recipe.stages[tokens], Pack):
        return min(pack.context, model.context)
    if not isinstance(stage, PackedTraining):
        return model.context
    pairs = 2 if isinstance(stage, LearnPreferences) else 1
    if stage.context is not None:
        return pairs * min(stage.context, model.context)
    files = [path for table in stage.tables()[0] if not table.files.hub for path in table.files.matches()]
    longest = longest_line(files)
    guess = USUAL_ROW if longest is None else max(SHORTEST_ROW, 1 << int(longest / BYTES_PER_TOKEN).bit_length())
    return min(pairs * model.context, guess)


def adapter_of(stage: Stage) -> AdapterFields | None:
    """The adapter that a training learns; None where all weights learn."""
    if isinstance(stage, TrainAdapter):
        return stage
    return stage.lora if isinstance(stage, LearnPreferences) else None


def longest_line(files: Sequence[Path]) -> int | None:
    """Bytes of the longest line at the beginning of any of the files; None where they have no lines that can be seen."""
    heads = [head for path in files if (head := _head(path)) is not None]
    longest = max((len(line) for head in heads for line in head.splitlines()), default=0)
    return longest or None


def text_bytes(path: Path) -> float:
    """Bytes of the text in a file, uncompressed; estimated for compressed files."""
    size = path.stat().st_size
    if path.suffix in (".zst", ".parquet"):
        return size * UNPACKED
    if path.suffix != ".gz" or not size:
        return float(size)
    with path.open("rb") as file:
        head = file.read(SAMPLE)
    decoder = zlib.decompressobj(wbits=31)
    try:
        text = len(decoder.decompress(head, LARGEST_SAMPLE))
    except zlib.error:  # its stage will report it
        return size * UNPACKED
    return text * size / (len(head) - len(decoder.unconsumed_tail))


def _head(path: Path) -> bytes | None:
    """The beginning of the text of a file; None where it is not lines of text."""
    if path.suffix == ".gz":
        with path.open("rb") as file, suppress(zlib.error):
            return zlib.decompressobj(wbits=31).decompress(file.read(SAMPLE), LARGEST_SAMPLE)
        return None
    if path.suffix not in (".jsonl", ".csv", ".tsv"):
        return None
    with path.open("rb") as file:
        return file.read(SAMPLE)

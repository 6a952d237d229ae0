"""The artifacts that stages pass to each other: folders with fixed file names, which are defined only here.

This file says where each file is, and which files are content: the digest of an artifact is over those. `llm` and the stages
read and write them.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

RECORD = "record.json"  # how the artifact was made: fields, digests, metrics, durations, versions
METRICS = "metrics.jsonl"  # what the worker reported while it made the artifact
PAUSED = "paused.json"  # the message of an alert that waits for a person; deleted when the stage continues
NOT_CONTENT = frozenset({RECORD, METRICS})
SCRATCH = ".work"  # files that only a restart needs


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifact:
    """The folder of an artifact, finished or in progress. Subclasses name its files."""

    folder: Path

    not_content: ClassVar[frozenset[str]] = NOT_CONTENT

    def content(self) -> list[Path]:
        """The content files, sorted by name: all but the records of how it was made, scratch and temporary files (whose names
        begin with a dot).
        """
        files = {path.relative_to(self.folder): path for path in self.folder.rglob("*") if path.is_file()}
        return sorted(
            path
            for name, path in files.items()
            if not any(part.startswith(".") for part in name.parts) and name.as_posix() not in self.not_content
        )

    def attachments(self) -> list[Path]:
        """Other files that belong to the artifact, such as a model card, without the record, which names them."""
        return sorted(path for name in self.not_content - {RECORD} if (path := self.folder / name).is_file())

    def digests(self) -> dict[str, str]:
        """sha256 of each content file, by its path inside the folder."""
        return self.digests_of(self.content())

    def digests_of(self, paths: Iterable[Path]) -> dict[str, str]:
        """sha256 of files of the artifact, by their paths inside the folder."""
        return {path.relative_to(self.folder).as_posix(): digest_file(path) for path in paths}


@dataclass(frozen=True)
class Corpus(Artifact):
    """Cleaned documents, one JSON object per line: `text`, `source`, and `passes` (how often an epoch has it)."""

    @property
    def train(self) -> Path:
        """Documents to learn from."""
        return self.folder / "train.jsonl"

    @property
    def validation(self) -> Path:
        """Documents held out by the hash of their text."""
        return self.folder / "validation.jsonl"


@dataclass(frozen=True)
class Tokenizer(Artifact):
    """A byte-level BPE with its chat template, in the format of Transformers."""

    @property
    def model(self) -> Path:
        """The tokenizer, in the format of the `tokenizers` library."""
        return self.folder / "tokenizer.json"

    @property
    def config(self) -> Path:
        """Special tokens and the chat template, in the format of Transformers."""
        return self.folder / "tokenizer_config.json"


@dataclass(frozen=True)
class Tokens(Artifact):
    """Token shards with document boundaries, and their tokenizer. `llm.data.token_shards` reads and writes them."""

    @property
    def train(self) -> Path:
        """Folder of the training shards."""
        return self.folder / "train"

    @property
    def validation(self) -> Path:
        """Folder of the validation shards."""
        return self.folder / "validation"

    @property
    def tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer, for the checkpoints that are trained on these tokens."""
        return Tokenizer(self.folder / "tokenizer")


@dataclass(frozen=True)
class Checkpoint(Artifact):
    """A model folder that stock Transformers opens: config, safetensors, tokenizer, chat template, generation config."""

    @property
    def config(self) -> Path:
        """The architecture, as Transformers' LlamaConfig."""
        return self.folder / "config.json"

    @property
    def weights(self) -> Path:
        """All weights, one safetensors file."""
        return self.folder / "model.safetensors"

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, in the same folder."""
        return Tokenizer(self.folder)


@dataclass(frozen=True)
class TrainingState(Checkpoint):
    """A Checkpoint with what its training needs to continue; `llm.training.checkpoint` reads and writes it."""

    @property
    def optimizer(self) -> Path:
        """The optimizer state of each weight, one safetensors file."""
        return self.folder / "optimizer.safetensors"

    @property
    def training(self) -> Path:
        """The step, the counters and the runtime of the training."""
        return self.folder / "training.json"


@dataclass(frozen=True)
class Adapter(Artifact):
    """LoRA weights in the format of PEFT."""

    @property
    def config(self) -> Path:
        """PEFT's LoraConfig."""
        return self.folder / "adapter_config.json"

    @property
    def weights(self) -> Path:
        """The low-rank matrices, one safetensors file."""
        return self.folder / "adapter_model.safetensors"


@dataclass(frozen=True)
class Gguf(Artifact):
    """A model as GGUF files, one per precision, and the Modelfile that makes one of them a model of Ollama."""

    def file(self, precision: str) -> Path:
        """The file of a precision; llama.cpp and Ollama find it in a repository by the end of its name."""
        return self.folder / f"model-{precision.upper()}.gguf"

    def files(self) -> dict[str, Path]:
        """All files, by precision."""
        return {path.stem.removeprefix("model-").lower(): path for path in sorted(self.folder.glob("model-*.gguf"))}

    @property
    def modelfile(self) -> Path:
        """For `ollama create`."""
        return self.folder / "Modelfile"


@dataclass(frozen=True)
class Parity(Artifact):
    """The comparison of a model with other systems that open it."""

    @property
    def results(self) -> Path:
        """`{"checks": [{"name": "Transformers: tokens", "passed": true, "compared": 1012}]}`; null: could not be checked."""
        return self.folder / "parity.json"


@dataclass(frozen=True)
class Scores(Artifact):
    """The result of an evaluation: flat names `task.metric`, deterministic values only."""

    not_content: ClassVar[frozenset[str]] = NOT_CONTENT | {"values.json"}  # its last digits depend on the number of cores

    @property
    def scores(self) -> Path:
        """`{"scores": {"section.macro_f1": 0.91}, "intervals": {"section.macro_f1": [0.89, 0.93]},
        "counts": {"section": 833}}`; the intervals at 95% confidence.
        """
        return self.folder / "scores.json"

    @property
    def values(self) -> Path:
        """The values of each example, by task and name of the value."""
        return self.folder / "values.json"

    @property
    def errors(self) -> Path:
        """Wrong examples, one JSON object per line."""
        return self.folder / "errors.jsonl"

    def side_by_side(self, task: str) -> Path:
        """The page that shows the answers of two models side by side."""
        return self.folder / f"{task}.html"


@dataclass(frozen=True)
class Release(Artifact):
    """The folder to push: a Checkpoint with model card, resolved recipe, lock file and scores."""

    not_content: ClassVar[frozenset[str]] = NOT_CONTENT | {"README.md", "recipe.lock.json", "curves.png"}

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / "README.md"

    @property
    def recipe(self) -> Path:
        """The resolved recipe, which can be run again."""
        return self.folder / "recipe.toml"

    @property
    def lock(self) -> Path:
        """Digests of inputs and artifacts, versions and hardware of this run."""
        return self.folder / "recipe.lock.json"

    @property
    def scores(self) -> Path:
        """The scores of the evaluations, by stage name."""
        return self.folder / "scores.json"

    @property
    def parity(self) -> Path:
        """The comparison of the model with other systems that open it."""
        return self.folder / "parity.json"

    @property
    def curves(self) -> Path:
        """The loss curves, an image for the card."""
        return self.folder / "curves.png"

    @property
    def adapter(self) -> Adapter:
        """The adapter, for PEFT."""
        return Adapter(self.folder / "adapter")

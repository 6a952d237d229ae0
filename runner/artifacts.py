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
ERROR = "error.json"  # in scratch: the message of the first process that failed, and whether a retry may help
NOT_CONTENT = frozenset({RECORD, METRICS})
SCRATCH = ".work"  # files that only a restart needs


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class InFolder:
    """The path of a file or folder of an artifact, by its name there."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, artifact: "Artifact", owner: type["Artifact"]) -> Path:
        """The path in the folder of `artifact`."""
        return artifact.folder / self._name


@dataclass(frozen=True)
class Artifact:
    """The folder of an artifact, finished or in progress. Subclasses name its files."""

    folder: Path

    not_content: ClassVar[frozenset[str]] = NOT_CONTENT

    @classmethod
    def serves_as(cls, wanted: "type[Artifact]") -> bool:
        """Whether it can be opened as an artifact of the class `wanted`."""
        return issubclass(cls, wanted)

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


class Corpus(Artifact):
    """Cleaned documents, one JSON object per line: `text`, `source`, and `passes` (how often an epoch has it)."""

    train = InFolder("train.jsonl")
    """Documents to learn from."""
    validation = InFolder("validation.jsonl")
    """Documents held out by the hash of their text."""


class Tokenizer(Artifact):
    """A byte-level BPE with its chat template, in the format of Transformers."""

    model = InFolder("tokenizer.json")
    """The tokenizer, in the format of the `tokenizers` library."""
    config = InFolder("tokenizer_config.json")
    """Special tokens and the chat template, in the format of Transformers."""


class Tokens(Artifact):
    """Token shards with document boundaries, and their tokenizer. `llm.data.token_shards` reads and writes them."""

    train = InFolder("train")
    """Folder of the training shards."""
    validation = InFolder("validation")
    """Folder of the validation shards."""

    @property
    def tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer, for the checkpoints that are trained on these tokens."""
        return Tokenizer(self.folder / "tokenizer")


class Checkpoint(Artifact):
    """A model folder that stock Transformers opens: config, safetensors, tokenizer, chat template, generation config."""

    config = InFolder("config.json")
    """The architecture, as Transformers' configuration of its family."""
    weights = InFolder("model.safetensors")
    """All weights; of a model of more than 5 GB there are shards instead, which model.safetensors.index.json names."""

    @classmethod
    def serves_as(cls, wanted: type[Artifact]) -> bool:
        """As a tokenizer, too: its files are in the same folder."""
        return issubclass(cls, wanted) or wanted is Tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, in the same folder."""
        return Tokenizer(self.folder)


class TrainingState(Checkpoint):
    """A Checkpoint with what its training needs to continue; `llm.training.checkpoint` reads and writes it."""

    optimizer = InFolder("optimizer.safetensors")
    """The optimizer state of each weight, one safetensors file."""
    training = InFolder("training.json")
    """The step, the counters and the runtime of the training."""


class Adapter(Artifact):
    """LoRA weights in the format of PEFT."""

    config = InFolder("adapter_config.json")
    """PEFT's LoraConfig."""
    weights = InFolder("adapter_model.safetensors")
    """The low-rank matrices, one safetensors file."""


class Gguf(Artifact):
    """A model as GGUF files, one per precision, and the Modelfile that makes one of them a model of Ollama."""

    modelfile = InFolder("Modelfile")
    """For `ollama create`."""

    def file(self, precision: str) -> Path:
        """The file of a precision; llama.cpp and Ollama find it in a repository by the end of its name."""
        return self.folder / f"model-{precision.upper()}.gguf"

    def files(self) -> dict[str, Path]:
        """All files, by precision."""
        return {path.stem.removeprefix("model-").lower(): path for path in sorted(self.folder.glob("model-*.gguf"))}


class Parity(Artifact):
    """The comparison of a model with other systems that open it."""

    results = InFolder("parity.json")
    """`{"checks": [{"name": "Transformers: tokens", "passed": true, "compared": 1012}]}`; null: could not be checked."""


class Scores(Artifact):
    """The result of an evaluation: flat names `task.metric`, deterministic values only."""

    not_content: ClassVar[frozenset[str]] = NOT_CONTENT | {"values.json"}  # its last digits depend on the number of cores

    scores = InFolder("scores.json")
    """`{"scores": {"section.macro_f1": 0.91}, "intervals": {"section.macro_f1": [0.89, 0.93]},
    "counts": {"section": 833}}`; the intervals at 95% confidence."""
    values = InFolder("values.json")
    """The values of each example, by task and name of the value."""
    errors = InFolder("errors.jsonl")
    """Wrong examples, one JSON object per line."""

    def side_by_side(self, task: str) -> Path:
        """The page that shows the answers of two models side by side."""
        return self.folder / f"{task}.html"


class Release(Artifact):
    """The folder to push: a Checkpoint with model card, resolved recipe, lock file and scores."""

    not_content: ClassVar[frozenset[str]] = NOT_CONTENT | {"README.md", "recipe.lock.json", "curves.png"}

    card = InFolder("README.md")
    """The model card."""
    recipe = InFolder("recipe.toml")
    """The resolved recipe, which can be run again."""
    lock = InFolder("recipe.lock.json")
    """Digests of inputs and artifacts, versions and hardware of this run."""
    scores = InFolder("scores.json")
    """The scores of the evaluations, by stage name."""
    parity = InFolder("parity.json")
    """The comparison of the model with other systems that open it."""
    curves = InFolder("curves.png")
    """The loss curves, an image for the card."""

    @property
    def adapter(self) -> Adapter:
        """The adapter, for PEFT."""
        return Adapter(self.folder / "adapter")

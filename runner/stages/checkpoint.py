"""The kind `checkpoint`: an existing model, from a local folder or from the Hub, for the other stages to start from.

    [stage.base]
    kind = "checkpoint"
    repo = "HuggingFaceTB/SmolLM2-135M"      # or: folder = "models/smol", or folder = "models/smol-Q8_0.gguf"

`llm.models.import_checkpoint` checks and rewrites the model. Nothing of it is executed or unpickled.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from runner.artifacts import Checkpoint
from runner.hub.target import repository_name
from runner.input_files import InputFile, InputFolder
from runner.stage import Context, Execution, Metrics, Semantic, Stage

if TYPE_CHECKING:
    from runner.hub.download import Snapshot

CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
GGUF = ".gguf"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Word = Annotated[str, Field(min_length=1, max_length=100)]


class ModelFolder(InputFolder):
    """A folder with a model, or a GGUF file. The content of the files that are read is identity."""

    @property
    def source(self) -> Path:
        """The folder as Transformers saves it, or the GGUF file: the only one of a folder without a config.json stands for
        it."""
        place = Path(self.pattern)
        files = [] if place.suffix == GGUF or (place / CONFIGS[0]).exists() else sorted(place.glob(f"*{GGUF}"))
        return files[0] if len(files) == 1 else place

    def matches(self) -> list[Path]:
        """The files in it that are read, sorted by path."""
        source = self.source
        if source.suffix == GGUF:
            return sorted(path for path in (source, *(source.with_name(name) for name in TOKENIZER)) if path.is_file())
        named = [source / name for name in (*CONFIGS, *TOKENIZER, INDEX)]
        return sorted(path for path in [*named, *source.glob("model*.safetensors")] if path.is_file())


class ImportCheckpoint(Stage, kind="checkpoint", version=2, makes=Checkpoint):
    """Imports a model of one of the families of `architecture.name`, to be fine-tuned, adapted, merged, evaluated and
    published."""

    imports = ("llm.models.import_checkpoint",)

    folder: Semantic[ModelFolder | None] = None
    """A folder as Transformers saves it: config.json, tokenizer.json and safetensors. Or a GGUF file, whose weights are
    dequantized; its tokenizer is that of the files beside it, else the one in it, as llama.cpp runs it."""
    repo: Semantic[Annotated[str, AfterValidator(repository_name), Field(pattern="/")] | None] = None
    """Instead of a folder: a model on the Hub, "owner/name"."""
    gguf: Semantic[Annotated[str, Field(pattern=r"^[\w.-]+\.gguf$")] | None] = None
    """The GGUF file of a `repo` to take, instead of its safetensors."""
    revision: Semantic[str] = Field("main", min_length=1)
    """Branch, tag or commit of the model on the Hub; resolved to a commit, which the record has."""
    chat_template: Semantic[Annotated[str, Field(min_length=1)] | None] = None
    """A chat template to replace the model's own. It marks what the assistant says with {% generation %}, including the end
    token. A model without a template gets one with "User:" and "Assistant:" between its own begin and end tokens."""
    model_id: Execution[Annotated[str, AfterValidator(repository_name)] | None] = None
    """For the card of a release: the name on the Hub of the model that a folder holds."""
    license: Execution[Annotated[str, Field(min_length=1)] | None] = None
    """For the card of a release: the licence of the model, by its name on the Hub; also the default of `publish`."""
    add_tokens: Semantic[Annotated[list[Word], Field(min_length=1)] | None] = None
    """Words that become tokens, each wherever it occurs: terms that the tokenizer cuts into many pieces. Their rows in the
    embedding start as the mean of those pieces, so they are to be learned: by `pretrain` with this stage as its `base`, or by
    `lora` with modules_to_save = ["embed_tokens"]."""
    add_tokens_from: Semantic[InputFile | None] = None
    """Files with such words, one a line."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.folder is None) == (self.repo is None):
            raise ValueError("expected either folder or repo" + ("" if self.folder is None else ", got both"))
        if self.repo is None and self.gguf is not None:
            raise ValueError(
                f"gguf: expected a repo on the Hub beside it, got a folder and {self.gguf!r}; folder may name the file"
            )
        if self.repo is None and self.revision != "main":  # the default, since a resolved recipe writes it out
            raise ValueError(f"revision: expected a repo on the Hub beside it, got a folder and {self.revision!r}")
        return self

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer of a local folder, before it is imported."""
        if self.folder is None:
            return None
        place = self.folder.source
        path = place.with_name(TOKENIZER[0]) if place.suffix == GGUF else place / TOKENIZER[0]
        return path if path.is_file() else None

    def words(self) -> list[str]:
        """The words of `add_tokens` and `add_tokens_from`, each once."""
        files = [] if self.add_tokens_from is None else self.add_tokens_from.fetched()
        lines = [line.strip() for path in files for line in path.read_text(encoding="utf-8").splitlines()]
        return list(dict.fromkeys([*(self.add_tokens or ()), *filter(None, lines)]))

    def _unpacked(self, context: Context, source: Path) -> Path:
        """The folder of a model, unpacked if it is a GGUF file."""
        from llm.models.gguf_file import unpack_gguf

        if source.suffix != GGUF:
            return source
        unpack_gguf(source, context.scratch / "unpacked")
        return context.scratch / "unpacked"

    def run(self, context: Context) -> Metrics:
        """Check the small files, download the weights if they are on the Hub, and write the checkpoint."""
        from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint

        if self.folder is not None:
            candidate = inspect_checkpoint(self._unpacked(context, self.folder.source), chat_template=self.chat_template)
            return import_checkpoint(candidate, context.work, add_tokens=self.words())
        from runner.hub import download

        assert self.repo is not None  # one of the two is there
        folder = context.scratch / "source"
        snapshot = download.find_snapshot(self.repo, self.revision, kept=context.scratch / "snapshot.json")
        wanted: dict[str, Any] = {"report": context.report, "should_stop": context.should_stop}
        for name in (*CONFIGS, *TOKENIZER, INDEX):
            if name in snapshot.files and not (name == INDEX and WEIGHTS in snapshot.files):
                download.download_file(snapshot, name, folder, **wanted)
        if self.gguf is not None:
            _check_file(snapshot, self.gguf)
            download.download_file(snapshot, self.gguf, folder, **wanted)
            candidate = inspect_checkpoint(self._unpacked(context, folder / self.gguf), chat_template=self.chat_template)
        else:
            candidate = inspect_checkpoint(folder, chat_template=self.chat_template)
            for name in _weights(snapshot, folder):
                download.download_file(snapshot, name, folder, **wanted)
        facts = import_checkpoint(candidate, context.work, add_tokens=self.words())
        return {**facts, "repo": self.repo, "revision": self.revision, "commit": snapshot.commit}


def _check_file(snapshot: "Snapshot", name: str) -> None:
    from llm.errors import InputError

    if name not in snapshot.files:
        others = ", ".join(other for other in sorted(snapshot.files) if other.endswith(GGUF)) or "none"
        raise InputError(f"{snapshot}: expected the file {name}, got none; its GGUF files: {others}")


def _weights(snapshot: "Snapshot", folder: Path) -> list[str]:
    """The names of the weight files; their index, if there is one, is in `folder`."""
    from llm.errors import InputError
    from llm.models.checkpoint import no_weights, weight_files

    if WEIGHTS in snapshot.files:
        return [WEIGHTS]
    if INDEX not in snapshot.files:
        raise InputError(f"{snapshot}: {no_weights(snapshot.files)}")
    names = [path.name for path in weight_files(folder)]
    if missing := [name for name in names if name not in snapshot.files]:
        raise InputError(f"{snapshot}: expected {missing[0]}, which {INDEX} names, got no such file")
    return names

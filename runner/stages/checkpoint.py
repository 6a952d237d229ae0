"""The kind `checkpoint`: an existing model, from a local folder or from the Hub, for the other stages to start from.

    [stage.base]
    kind = "checkpoint"
    repo = "HuggingFaceTB/SmolLM2-135M"      # or: folder = "models/smol"

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
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Word = Annotated[str, Field(min_length=1, max_length=100)]


class ModelFolder(InputFolder):
    """A folder with a model. The content of the files that are read is identity."""

    def matches(self) -> list[Path]:
        """The files in it that are read, sorted by path."""
        folder = Path(self.pattern)
        named = [folder / name for name in (*CONFIGS, *TOKENIZER, INDEX)]
        return sorted(path for path in [*named, *folder.glob("model*.safetensors")] if path.is_file())


class ImportCheckpoint(Stage, kind="checkpoint", version=2, makes=Checkpoint):
    """Imports a model of one of the families of `architecture.name`, to be fine-tuned, adapted, merged, evaluated and published."""

    imports = ("llm.models.import_checkpoint",)

    folder: Semantic[ModelFolder | None] = None
    """A folder as Transformers saves it: config.json, tokenizer.json and safetensors."""
    repo: Semantic[Annotated[str, AfterValidator(repository_name), Field(pattern="/")] | None] = None
    """Instead of a folder: a model on the Hub, "owner/name"."""
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
        if self.repo is None and self.revision != "main":  # the default, since a resolved recipe writes it out
            raise ValueError(f"revision: expected a repo on the Hub beside it, got a folder and {self.revision!r}")
        return self

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer of a local folder, before it is imported."""
        return None if self.folder is None else Path(self.folder.pattern, TOKENIZER[0])

    def words(self) -> list[str]:
        """The words of `add_tokens` and `add_tokens_from`, each once."""
        files = [] if self.add_tokens_from is None else self.add_tokens_from.fetched()
        lines = [line.strip() for path in files for line in path.read_text(encoding="utf-8").splitlines()]
        return list(dict.fromkeys([*(self.add_tokens or ()), *filter(None, lines)]))

    def run(self, context: Context) -> Metrics:
        """Check the small files, download the weights if they are on the Hub, and write the checkpoint."""
        from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint

        if self.folder is not None:
            candidate = inspect_checkpoint(Path(self.folder.pattern), chat_template=self.chat_template)
            return import_checkpoint(candidate, context.work, add_tokens=self.words())
        from runner.hub import download

        assert self.repo is not None  # one of the two is there
        folder = context.scratch / "source"
        snapshot = download.find_snapshot(self.repo, self.revision, kept=context.scratch / "snapshot.json")
        wanted: dict[str, Any] = {"report": context.report, "should_stop": context.should_stop}
        for name in (*CONFIGS, *TOKENIZER, INDEX):
            if name in snapshot.files and not (name == INDEX and WEIGHTS in snapshot.files):
                download.download_file(snapshot, name, folder, **wanted)
        candidate = inspect_checkpoint(folder, chat_template=self.chat_template)
        for name in _weights(snapshot, folder):
            download.download_file(snapshot, name, folder, **wanted)
        facts = import_checkpoint(candidate, context.work, add_tokens=self.words())
        return {**facts, "repo": self.repo, "revision": self.revision, "commit": snapshot.commit}


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

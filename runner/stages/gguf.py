"""The kind `gguf`: a checkpoint as GGUF files, for llama.cpp and for Ollama.

    [stage.gguf]
    kind = "gguf"
    model = "release"
    precisions = ["f32", "q8_0"]

`llm.export.gguf` writes the files; the kind `parity` checks that llama.cpp computes the same.
"""

import json
from collections.abc import Iterator, Mapping

from pydantic import Field, field_validator

from llm.export import GgufPrecision
from runner.artifacts import Checkpoint, Gguf
from runner.files import write_whole
from runner.graph import ancestors, inputs_of
from runner.stage import Context, Metrics, Ref, Semantic, Stage
from runner.stages.checkpoint import ImportCheckpoint


class WriteGguf(Stage, kind="gguf", version=3, makes=Gguf):
    """Writes a model with its tokenizer and chat template as GGUF files, and a Modelfile for Ollama."""

    imports = ("llm.export.gguf",)

    model: Semantic[Ref[Checkpoint]]
    """The model to write."""
    precisions: Semantic[list[GgufPrecision]] = Field(["f32"], min_length=1)
    """One file for each: "f32", "f16", "bf16", or in blocks of 32 numbers "q8_0" (8 bits), "q5_1", "q5_0", "q4_1" and "q4_0"; a
    block of a name in _1 has an offset beside its scale. Below 8 bits, embedding and head stay in q8_0. The Modelfile uses the
    smallest."""

    @field_validator("precisions")
    @classmethod
    def _each_once(cls, precisions: list[GgufPrecision]) -> list[GgufPrecision]:
        if twice := sorted({precision for precision in precisions if precisions.count(precision) > 1}):
            raise ValueError(f"expected each precision once, got {twice[0]!r} twice")
        return precisions

    def faults_among(self, stages: Mapping[str, Stage]) -> Iterator[str]:
        """A tokenizer that llama.cpp has no name for, where it lies in a folder: before anything is trained."""
        from llm.errors import InputError
        from llm.tokenizer.llama_cpp import for_llama_cpp

        above = ancestors(inputs_of(stages), self.model) | {self.model}
        imported = [stage for stage in map(stages.get, sorted(above)) if isinstance(stage, ImportCheckpoint)]
        if len(imported) != 1 or (path := imported[0].tokenizer_file) is None:
            return
        try:
            for_llama_cpp(json.loads(path.read_text(encoding="utf-8")), thorough=False)
        except InputError as error:
            yield f"model: {path}: {error}"
        except (OSError, ValueError, KeyError, TypeError):  # the stage that imports it says so
            return

    def run(self, context: Context) -> Metrics:
        """Write the files that do not exist yet."""
        from llm.export.gguf import write_gguf
        from llm.export.gguf_tokenizer import adds_begin
        from llm.export.ollama import modelfile
        from llm.models.sampling_defaults import read_sampling
        from llm.tokenizer.tokenizer import TextTokenizer

        checkpoint, made = context.open(self.model), Gguf(context.work)
        facts = {}
        for number, precision in enumerate(self.precisions):
            facts[precision] = write_gguf(checkpoint.folder, made.file(precision), precision=precision)
            context.report(done=number + 1, total=len(self.precisions), unit="files")
        smallest = min(self.precisions, key=lambda precision: made.file(precision).stat().st_size)
        tokenizer = TextTokenizer.load(checkpoint.folder)
        begin = adds_begin(checkpoint.folder, tokenizer)
        text = modelfile(
            tokenizer,
            made.file(smallest).name,
            context=facts[smallest]["context"],
            sampling=read_sampling(checkpoint.folder),
            adds_begin=begin,
        )
        write_whole(made.modelfile, text)
        return {"files": facts}

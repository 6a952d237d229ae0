"""The kind `gguf`: a checkpoint as GGUF files, for llama.cpp and for Ollama.

    [stage.gguf]
    kind = "gguf"
    model = "release"
    precisions = ["f32", "q8_0"]

`llm.export.gguf` writes the files; the kind `parity` checks that llama.cpp computes the same.
"""

from pydantic import Field, field_validator

from llm.export import GgufPrecision
from runner.artifacts import Checkpoint, Gguf
from runner.files import write_whole
from runner.stage import Context, Metrics, Ref, Semantic, Stage


class WriteGguf(Stage, kind="gguf", version=2, makes=Gguf):
    """Writes a model with its tokenizer and chat template as GGUF files, and a Modelfile for Ollama."""

    imports = ("llm.export.gguf",)

    model: Semantic[Ref[Checkpoint]]
    """The model to write."""
    precisions: Semantic[list[GgufPrecision]] = Field(["f32"], min_length=1)
    """One file for each: "f32", "f16", "bf16", "q8_0" (blocks of 32 numbers in 8 bits). The Modelfile uses the smallest."""

    @field_validator("precisions")
    @classmethod
    def _each_once(cls, precisions: list[GgufPrecision]) -> list[GgufPrecision]:
        if twice := sorted({precision for precision in precisions if precisions.count(precision) > 1}):
            raise ValueError(f"expected each precision once, got {twice[0]!r} twice")
        return precisions

    def run(self, context: Context) -> Metrics:
        """Write the files that do not exist yet."""
        from llm.export.gguf import write_gguf
        from llm.export.gguf_tokenizer import adds_begin
        from llm.export.ollama import modelfile
        from llm.tokenizer.tokenizer import TextTokenizer

        checkpoint, made = context.open(self.model), Gguf(context.work)
        facts = {}
        for number, precision in enumerate(self.precisions):
            facts[precision] = write_gguf(checkpoint.folder, made.file(precision), precision=precision)
            context.report(done=number + 1, total=len(self.precisions), unit="files")
        smallest = min(self.precisions, key=lambda precision: made.file(precision).stat().st_size)
        tokenizer = TextTokenizer.load(checkpoint.folder)
        begin = adds_begin(checkpoint.folder, tokenizer)
        text = modelfile(tokenizer, made.file(smallest).name, context=facts[smallest]["context"], adds_begin=begin)
        write_whole(made.modelfile, text)
        return {"files": facts}

"""The kind `gguf`: a checkpoint as GGUF files, for llama.cpp and for Ollama.

    [stage.gguf]
    kind = "gguf"
    model = "release"
    precisions = ["f32", "q8_0"]

`llm.export.gguf` writes the files; the kind `parity` checks that llama.cpp computes the same.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, field_validator

from llm.export import GgufPrecision, KQuant
from runner.artifacts import Checkpoint, Gguf
from runner.files import write_whole
from runner.graph import ancestors, inputs_of
from runner.stage import Context, Metrics, Ref, Semantic, Stage
from runner.stages.checkpoint import TOKENIZER, ImportCheckpoint
from runner.stages.fields.parity_inputs import TextTable, read_sentences

IMPORTANCE_SENTENCES = 10_000  # about 1,000 chunks of text; the matrices of others are made from 100 to 500 of 512 tokens


class WriteGguf(Stage, kind="gguf", version=3, makes=Gguf):
    """Writes a model with its tokenizer and chat template as GGUF files, and a Modelfile for Ollama."""

    imports = ("llm.export.gguf",)

    model: Semantic[Ref[Checkpoint]]
    """The model to write."""
    precisions: Semantic[list[GgufPrecision | KQuant]] = Field(["f32"], min_length=1)
    """One file for each: "f32", "f16", "bf16", or in blocks of 32 numbers "q8_0" (8 bits), "q5_1", "q5_0", "q4_1" and "q4_0";
    a block of a name in _1 has an offset beside its scale. Below 8 bits, embedding and head stay in q8_0. K-quants, "q6_k",
    "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m" and "q2_k", are made by `llama-quantize` where it is on PATH. The
    Modelfile uses the smallest."""
    importance: Semantic[list[TextTable]] = Field(default_factory=list)
    """Files with text for an importance matrix, which K-quants are rounded by; wants `llama-imatrix` on PATH."""

    @field_validator("precisions")
    @classmethod
    def _each_once(cls, precisions: list[GgufPrecision | KQuant]) -> list[GgufPrecision | KQuant]:
        if twice := sorted({precision for precision in precisions if precisions.count(precision) > 1}):
            raise ValueError(f"expected each precision once, got {twice[0]!r} twice")
        return precisions

    def faults_among(self, stages: Mapping[str, Stage]) -> Iterator[str]:
        """A tokenizer that llama.cpp has no name for, where it lies in a folder: before anything is trained."""
        if (name := self._imported(stages)) is not None:
            stage = stages[name]
            assert isinstance(stage, ImportCheckpoint)
            yield from _tokenizer_faults(stage.tokenizer_file)

    def faults_given(self, stages: Mapping[str, Stage], made: Mapping[str, Path]) -> Iterator[str]:
        """The same, where it was fetched from the Hub."""
        if (name := self._imported(stages)) is not None and name in made:
            yield from _tokenizer_faults(made[name] / TOKENIZER[0])

    def _imported(self, stages: Mapping[str, Stage]) -> str | None:
        """The stage that the model's tokenizer was imported by, if there is one."""
        above = ancestors(inputs_of(stages), self.model) | {self.model}
        imported = [name for name in sorted(above) if isinstance(stages.get(name), ImportCheckpoint)]
        return imported[0] if len(imported) == 1 else None

    def lacks(self) -> Iterator[str]:
        """The tools of llama.cpp, for K-quants."""
        from llm.export.llama_quantize import CURE, missing_tool

        if self.k_quants and (tool := missing_tool(importance=bool(self.importance))):
            yield f"precisions: expected {tool} for {self.k_quants[0]!r}, got no such program: {CURE}"

    @property
    def k_quants(self) -> list[KQuant]:
        """The precisions that llama.cpp's tools make."""
        return [kind for kind in get_args(KQuant) if kind in self.precisions]

    def run(self, context: Context) -> Metrics:
        """Write the files that do not exist yet."""
        from llm.export.gguf import write_gguf

        checkpoint, made = context.open(self.model), Gguf(context.work)
        facts: dict[str, Any] = {}
        own: list[GgufPrecision] = [kind for kind in get_args(GgufPrecision) if kind in self.precisions]
        for number, precision in enumerate(own):
            facts[precision] = write_gguf(checkpoint.folder, made.file(precision), precision=precision)
            context.report(done=number + 1, total=len(self.precisions), unit="files")
        if self.k_quants:
            facts |= self._write_k_quants(context, checkpoint, made)
        self._write_modelfile(checkpoint, made, facts)
        return {"files": {precision: facts[precision] for precision in self.precisions}}

    def _write_k_quants(self, context: Context, checkpoint: Checkpoint, made: Gguf) -> dict[str, Any]:
        """The files by llama.cpp's tools, from one in f32."""
        from llm.export.gguf import tensor_types, write_gguf
        from llm.export.llama_quantize import importance_matrix, quantize

        source, matrix, texts = (context.scratch / name for name in ("source.gguf", "importance.gguf", "texts.txt"))
        facts = write_gguf(checkpoint.folder, source, precision="f32")
        if self.importance:
            sentences = islice(read_sentences([], self.importance), IMPORTANCE_SENTENCES)
            texts.write_text("\n".join(sentences) + "\n", encoding="utf-8")
            importance_matrix(source, texts, matrix, cores=context.cores)
        found: dict[str, Any] = {}
        for precision in self.k_quants:
            path = made.file(precision)
            quantize(source, path, precision, importance=matrix if self.importance else None, cores=context.cores)
            found[precision] = facts | {"bytes": path.stat().st_size, "tensors": tensor_types(path)}
            context.report(done=len(found), total=len(self.k_quants), unit="files")
        return found

    def _write_modelfile(self, checkpoint: Checkpoint, made: Gguf, facts: Mapping[str, Any]) -> None:
        from llm.export.gguf_tokenizer import adds_begin
        from llm.export.ollama import modelfile
        from llm.models.sampling_defaults import read_sampling
        from llm.tokenizer.tokenizer import TextTokenizer

        smallest = min(self.precisions, key=lambda precision: made.file(precision).stat().st_size)
        tokenizer = TextTokenizer.load(checkpoint.folder)
        text = modelfile(
            tokenizer,
            made.file(smallest).name,
            context=facts[smallest]["context"],
            sampling=read_sampling(checkpoint.folder),
            adds_begin=adds_begin(checkpoint.folder, tokenizer),
        )
        write_whole(made.modelfile, text)


def _tokenizer_faults(path: Path | None) -> Iterator[str]:
    """What llama.cpp lacks for the tokenizer in `path`."""
    from llm.errors import InputError
    from llm.files import read_json
    from llm.tokenizer.bounds import LARGEST
    from llm.tokenizer.llama_cpp import for_llama_cpp

    if path is None:
        return
    try:
        stored = read_json(path, LARGEST)
    except (OSError, InputError):  # the stage that imports it says so
        return
    try:
        for_llama_cpp(stored, thorough=False)
    except InputError as error:
        yield f"model: {path}: {error}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # as above
        return

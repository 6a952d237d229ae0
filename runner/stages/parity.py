"""The kind `parity`: whether a model computes the same in every system that opens it. A model that does not is not released.

    [stage.parity]
    kind = "parity"
    model = "release"
    gguf = "gguf"
    text = [{ files = "data/general_en_val.jsonl.gz" }, { files = "data/general_zh_val.jsonl.gz" }]
    prompts = [{ files = "data/medical_qa_test.jsonl.gz" }]

A recipe that publishes without such a stage gets one (`runner.stages.publish`). `llm.export.parity` compares.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from runner.artifacts import Adapter, Checkpoint, Corpus, Gguf, Parity
from runner.files import write_whole
from runner.stage import Context, Lineage, Metrics, Ref, Semantic, Stage, Verdict
from runner.stages.fields.data_tables import RowTable
from runner.stages.fields.parity_inputs import ParityInputs, TextTable, read_rows, read_sentences

if TYPE_CHECKING:
    from llm.export.parity import Backend, Check, Known, Reference

LIKELIHOODS = 20  # prompts after which log-probabilities are compared


@dataclass(frozen=True)
class ParityVerdict:
    """The result of one comparison."""

    gate: str  # what was compared
    found: str  # the outcome
    passed: bool

    def __str__(self) -> str:
        return f"{self.gate}: {self.found}" if self.gate else self.found


def outcome(*, passed: bool | None, told: str, **numbers: Any) -> str:
    """The outcome of a comparison as a sentence."""
    return f"{'not checked' if passed is None else 'equal' if passed else 'not equal'}: {told}"


class CheckParity(Stage, kind="parity", version=3, makes=Parity):
    """Compares a model in stock Transformers, PEFT and llama.cpp with the model as it was trained."""

    imports = ("llm.export.parity",)

    model: Semantic[Ref[Checkpoint]]
    """The model to be released."""
    gguf: Semantic[Ref[Gguf] | None] = None
    """Its GGUF files. Without llama.cpp (`pip install 'stockpot[llama-cpp]'`) they are reported as not checked."""
    base: Semantic[Ref[Checkpoint] | None] = None
    """The model that `adapter` was trained on."""
    adapter: Semantic[Ref[Adapter] | None] = None
    """An adapter that is released with it."""
    corpora: Semantic[Annotated[list[Ref[Corpus]], Field(default_factory=list)]]
    """Corpora from whose held-out documents sentences are taken."""
    text: Semantic[list[TextTable]] = Field(default_factory=list)
    """Files from which sentences are taken. A few sentences that are hard to tokenize are always added."""
    prompts: Semantic[list[RowTable]] = Field(default_factory=list)
    """Rows whose prompts are answered and whose chats are rendered; without any, sentences are used instead."""
    sentences: Semantic[int] = Field(1000, gt=0)
    """Number of sentences to tokenize, an equal share for each language."""
    answers: Semantic[int] = Field(50, gt=0)
    """Number of prompts to answer."""
    max_new_tokens: Semantic[int] = Field(64, gt=0)
    """Most tokens of an answer."""

    @model_validator(mode="after")
    def _adapter_with_base(self) -> Self:
        if (self.base is None) != (self.adapter is None):
            raise ValueError("expected base and adapter together, got " + ("adapter alone" if self.adapter else "base alone"))
        return self

    def run(self, context: Context) -> Metrics:
        """Make all comparisons, even if some fail."""
        from llm.export.parity import balanced_by_language
        from llm.tokenizer.tokenizer import TextTokenizer

        checkpoint = context.open(self.model)
        inputs = ParityInputs.choose(
            TextTokenizer.load(checkpoint.folder),
            list(read_sentences([context.open(corpus).validation for corpus in self.corpora], self.text)),
            list(read_rows(self.prompts)),
            positions=json.loads(checkpoint.config.read_text(encoding="utf-8"))["max_position_embeddings"],
            prompts=self.answers,
            max_new_tokens=self.max_new_tokens,
        )
        chosen = balanced_by_language(inputs.sentences, self.sentences)
        sentences = [text for texts in chosen.values() for text in texts]
        checks = list(_until_stopped(context, self._checks(context, inputs, sentences)))
        told = {"checks": [{"name": check.name, "passed": check.passed, "compared": check.compared} for check in checks]}
        write_whole(Parity(context.work).results, json.dumps(told, indent=2) + "\n")
        return {
            "checks": [{**vars(check), "measured": dict(check.measured)} for check in checks],
            "sentences": {language: len(texts) for language, texts in chosen.items()},
            "prompts": len(inputs.prompts),
        }

    def verdicts(self, metrics: Metrics, lineage: Lineage) -> Sequence[Verdict]:
        """One verdict on all equal comparisons, and one on each other; what could not be checked passes, and says so."""
        equal = Counter(check["name"].partition(":")[0] for check in metrics["checks"] if check["passed"])
        others = [
            ParityVerdict(str(check["name"]), outcome(**check), passed=check["passed"] is None)
            for check in metrics["checks"]
            if not check["passed"]
        ]
        if not equal:
            return others
        return [ParityVerdict("", f"{equal.total()} comparisons equal, in {', '.join(equal)}", passed=True), *others]

    def _checks(self, context: Context, inputs: ParityInputs, sentences: list[str]) -> "Iterator[Check]":
        from llm.device import main_device
        from llm.export.parity import PROBES, Reference, check_answers, check_chats, check_likelihoods, check_tokens
        from llm.export.transformers_backend import TransformersBackend
        from llm.models.checkpoint import load_checkpoint

        folder, tokenizer = context.open(self.model).folder, inputs.tokenizer
        device = main_device().type
        model = load_checkpoint(folder, device=device)
        reference = Reference.of(model, tokenizer, inputs.prompts, max_new_tokens=inputs.max_new_tokens)
        texts = [*PROBES, *sentences]

        def words(other: "Backend", known: "Known | None" = None) -> "Iterator[Check]":
            yield check_tokens(tokenizer, other, texts, known=known)
            if tokenizer.template is not None:
                yield check_chats(tokenizer, other, inputs.chats, known=known)

        stock = TransformersBackend(folder, ends=tokenizer.ends, padding=tokenizer.padding, device=device)
        yield from words(stock)
        yield check_likelihoods(reference, stock, inputs.prompts[:LIKELIHOODS])
        yield check_answers(reference, stock)
        del stock
        if self.base is not None and self.adapter is not None:
            yield self._adapter_check(context, reference, inputs)
        for precision, path in context.open(self.gguf).files().items() if self.gguf is not None else ():
            yield from self._llama_cpp(
                path, precision, reference, words, folder=folder, scratch=context.scratch, cores=context.cores
            )

    def _adapter_check(self, context: Context, reference: "Reference", inputs: ParityInputs) -> "Check":
        """Whether stock PEFT computes the same with the adapter on the stock base."""
        from llm.adapters.lora import load_adapter
        from llm.export.parity import check_likelihoods
        from llm.export.transformers_backend import TransformersBackend
        from llm.models.checkpoint import load_checkpoint

        assert self.base is not None and self.adapter is not None
        base, adapter = context.open(self.base).folder, context.open(self.adapter).folder
        tokenizer, device = reference.tokenizer, str(reference.model.device)
        adapted = load_checkpoint(base, device=device)
        load_adapter(adapted, adapter)
        peft = TransformersBackend(base, ends=tokenizer.ends, padding=tokenizer.padding, adapter=adapter, device=device)
        return check_likelihoods(replace(reference, model=adapted), peft, inputs.prompts[:LIKELIHOODS])

    def _llama_cpp(
        self,
        path: Path,
        precision: str,
        reference: "Reference",
        words: "Callable[..., Iterator[Check]]",
        *,
        folder: Path,
        scratch: Path,
        cores: int,
    ) -> "Iterator[Check]":
        """The comparisons with llama.cpp for one file; answers have to be equal only for unrounded weights."""
        from llm.errors import InputError
        from llm.export.gguf import FULL
        from llm.export.gguf_tokenizer import KnownTokens
        from llm.export.llama_cpp_backend import PACKAGE, LlamaCppBackend
        from llm.export.parity import Check, check_answers, check_likelihoods, check_weights
        from llm.models.checkpoint import load_checkpoint
        from llm.models.gguf_file import unpack_gguf

        name = f"llama.cpp {precision}"
        if importlib.util.find_spec(PACKAGE) is None:
            told = "it is not installed here: pip install 'stockpot[llama-cpp]', and run this stage again with --force"
            yield Check(name, None, told)
            return
        try:
            other = LlamaCppBackend(
                path,
                name=name,
                context=max(map(len, reference.prompts)) + reference.max_new_tokens,
                vocab_size=reference.model.vocab_size,
                ends=reference.tokenizer.ends,
                threads=cores,
            )
            yield from words(other, KnownTokens(folder))
            # Activations that llama.cpp rounds to fp16 move as much probability as weights in fp16.
            bounds = "f16" if precision == "f32" and not reference.model.exact_in_llama_cpp else precision
            yield check_likelihoods(reference, other, reference.prompts[:LIKELIHOODS], precision=bounds)
            if bounds == "f32":
                yield check_answers(reference, other)
            elif precision not in FULL:  # a fault in such a file could hide behind what its rounding moves
                unpack_gguf(path, scratch / precision)
                model = load_checkpoint(scratch / precision, device=reference.model.device)
                texts = reference.prompts[:LIKELIHOODS]
                yield check_weights(reference, model, name=name, precision=precision)
                yield check_likelihoods(reference, other, texts, precision=precision, of_file=model)
        except InputError as error:
            yield Check(name, False, str(error))


def _until_stopped(context: Context, checks: "Iterator[Check]") -> "Iterator[Check]":
    from llm.errors import Interrupted

    for number, check in enumerate(checks, start=1):
        context.report(done=number, unit="comparisons", note=f"{check.name}: {outcome(**vars(check))}")
        yield check
        if context.should_stop():
            raise Interrupted("stopped while systems were compared")

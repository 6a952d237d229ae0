"""The kind `parity`: whether a model is the same in every system in which it will be opened. What fails here is not released.

    [stage.parity]
    kind = "parity"
    model = "release"
    gguf = "gguf"
    text = [{ files = "data/general_en_val.jsonl.gz" }, { files = "data/general_zh_val.jsonl.gz" }]
    prompts = [{ files = "data/medical_qa_test.jsonl.gz" }]

A recipe that publishes without one gets one by itself (`runner.stages.publish`). The comparing is `llm.parity`'s.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from llm.templates import split_text
from llm.turns import TextTemplate
from runner.artifacts import Adapter, Checkpoint, Corpus, Gguf, Parity
from runner.files import write_whole
from runner.stage import Context, InputFile, Metrics, Ref, Semantic, Spec, Stage, Verdict
from runner.stages.data import RowTable

if TYPE_CHECKING:
    from llm.parity import Check, Ours, System
    from llm.tokenizer import TextTokenizer

CORPUS_BYTES = 2**20  # of a corpus's held-out documents that are cut into sentences
MOST_ROWS = 5000  # of the files of a table that prompts are chosen from
LIKELIHOODS = 20  # texts after which log-probabilities are compared
TURNS = 10  # chats of several turns

T = TypeVar("T")
Chat = list[dict[str, str]]


class TextTable(Spec):
    """Files of held-out text."""

    files: Semantic[InputFile]
    """Path or glob: .jsonl, .txt or .csv (also .gz, .zst), or .parquet."""
    text: Semantic[str] = "text"
    """The field that holds the text, or a template over fields such as "{title}\\n{text}"."""

    @field_validator("text")
    @classmethod
    def _is_field_or_template(cls, text: str) -> str:
        split_text(text)
        return text


@dataclass(frozen=True)
class ParityVerdict:
    """The judgement of one comparison."""

    passed: bool
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def sentence(*, name: str, passed: bool | None, told: str, **numbers: Any) -> str:
    """What came of a comparison, for a person."""
    outcome = "not checked" if passed is None else "equal" if passed else "not equal"
    return f"{name}: {outcome}: {told}"


class CheckParity(Stage, kind="parity", version=1, makes=Parity):
    """Compares a model in stock Transformers, PEFT and llama.cpp with the model as it was trained."""

    model: Semantic[Ref[Checkpoint]]
    """What is to be released."""
    gguf: Semantic[Ref[Gguf] | None] = None
    """Its GGUF files. Where llama.cpp is not installed (`pip install 'stockpot[llama-cpp]'`), they are told as not checked."""
    base: Semantic[Ref[Checkpoint] | None] = None
    """The model that `adapter` was trained on."""
    adapter: Semantic[Ref[Adapter] | None] = None
    """An adapter that is released by itself."""
    corpora: Semantic[Annotated[list[Ref[Corpus]], Field(default_factory=list)]]
    """Corpora whose held-out documents give sentences."""
    text: Semantic[list[TextTable]] = Field(default_factory=list)
    """Files that give sentences. A few that are hard to cut into tokens are always among them."""
    prompts: Semantic[list[RowTable]] = Field(default_factory=list)
    """Rows whose prompts are answered and whose chats are rendered; without any, sentences stand in for them."""
    sentences: Semantic[int] = Field(1000, gt=0)
    """Sentences to cut into tokens, an even share of each language."""
    answers: Semantic[int] = Field(50, gt=0)
    """Prompts to answer."""
    max_new_tokens: Semantic[int] = Field(64, gt=0)
    """Longest answer."""

    @model_validator(mode="after")
    def _adapter_with_base(self) -> Self:
        if (self.base is None) != (self.adapter is None):
            raise ValueError("wants base and adapter together, found " + ("adapter alone" if self.adapter else "base alone"))
        return self

    def run(self, context: Context) -> Metrics:
        """Compare everything, whether or not something fails."""
        from llm.parity import balanced

        material = _Material.of(self, context)
        chosen = balanced(material.sentences, self.sentences)
        sentences = [text for texts in chosen.values() for text in texts]
        checks = list(_until_stopped(context, self._checks(context, material, sentences)))
        told = {"checks": [{"name": check.name, "passed": check.passed, "compared": check.compared} for check in checks]}
        write_whole(Parity(context.work).results, json.dumps(told, indent=2) + "\n")
        return {
            "checks": [{**vars(check), "measured": dict(check.measured)} for check in checks],
            "sentences": {language: len(texts) for language, texts in chosen.items()},
            "prompts": len(material.prompts),
        }

    def verdicts(self, metrics: Metrics) -> Sequence[Verdict]:
        """One of each comparison; what could not be checked passes, and says so."""
        return [ParityVerdict(check["passed"] is not False, sentence(**check)) for check in metrics["checks"]]

    def _checks(self, context: Context, material: "_Material", sentences: list[str]) -> "Iterator[Check]":
        import torch

        from llm.checkpoint import load_checkpoint
        from llm.parity import PROBES, Ours, check_answers, check_chats, check_likelihoods, check_tokens
        from llm.stock import StockModel

        folder, tokenizer = context.open(self.model).folder, material.tokenizer
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_checkpoint(folder, device=device)
        ours = Ours.of(model, tokenizer, material.prompts, max_new_tokens=material.max_new_tokens)
        texts = [*PROBES, *sentences]

        def words(other: "System") -> "Iterator[Check]":
            yield check_tokens(tokenizer, other, texts)
            if tokenizer.template is not None:
                yield check_chats(tokenizer, other, material.chats)

        stock = StockModel(folder, ends=tokenizer.ends, padding=tokenizer.padding, device=device)
        yield from words(stock)
        yield check_likelihoods(ours, stock, material.prompts[:LIKELIHOODS])
        yield check_answers(ours, stock)
        del stock
        if self.base is not None and self.adapter is not None:
            yield self._adapter_check(context, ours, material)
        for precision, path in context.open(self.gguf).files().items() if self.gguf is not None else ():
            yield from self._llama_cpp(path, precision, ours, words, cores=context.cores)

    def _adapter_check(self, context: Context, ours: "Ours", material: "_Material") -> "Check":
        """Whether stock PEFT computes with the adapter on the stock base what the adapter computes here."""
        from llm.checkpoint import load_checkpoint
        from llm.lora import load_adapter
        from llm.parity import check_likelihoods
        from llm.stock import StockModel

        assert self.base is not None and self.adapter is not None
        base, adapter = context.open(self.base).folder, context.open(self.adapter).folder
        adapted = load_checkpoint(base, device=ours.model.lm_head.weight.device)
        load_adapter(adapted, adapter)
        peft = StockModel(
            base,
            ends=ours.tokenizer.ends,
            padding=ours.tokenizer.padding,
            adapter=adapter,
            device=str(ours.model.lm_head.weight.device),
        )
        return check_likelihoods(replace(ours, model=adapted), peft, material.prompts[:LIKELIHOODS])

    def _llama_cpp(
        self, path: Path, precision: str, ours: "Ours", words: "Callable[[System], Iterator[Check]]", *, cores: int
    ) -> "Iterator[Check]":
        """What llama.cpp makes of one file: answers are to be equal where its weights are those that were trained."""
        from llm.errors import InputError
        from llm.llama_cpp import PACKAGE, LlamaCpp
        from llm.parity import Check, check_answers, check_likelihoods

        name = f"llama.cpp {precision}"
        if importlib.util.find_spec(PACKAGE) is None:
            yield Check(
                name,
                None,
                "it is not installed here: pip install 'stockpot[llama-cpp]', and run this stage again with --force",
            )
            return
        try:
            other = LlamaCpp(
                path,
                name=name,
                context=ours.model.config.context or 0,
                vocab_size=ours.model.vocab_size,
                ends=ours.tokenizer.ends,
                threads=cores,
            )
            yield from words(other)
            yield check_likelihoods(ours, other, ours.prompts[:LIKELIHOODS], precision=precision)
            if precision == "f32":
                yield check_answers(ours, other)
        except InputError as error:
            yield Check(name, False, str(error))


@dataclass(frozen=True)
class _Material:
    """What is compared."""

    tokenizer: "TextTokenizer"
    sentences: list[str]
    chats: list[Chat]  # each ends with an answer
    prompts: list[list[int]]
    max_new_tokens: int

    @classmethod
    def of(cls, stage: CheckParity, context: Context) -> "_Material":
        """Read from what the recipe names; rows and sentences that cannot be used are passed over."""
        from llm.parity import PROBES
        from llm.tokenizer import TextTokenizer

        checkpoint = context.open(stage.model)
        tokenizer = TextTokenizer.load(checkpoint.folder)
        most: int = json.loads(checkpoint.config.read_text(encoding="utf-8"))["max_position_embeddings"]
        max_new_tokens = min(stage.max_new_tokens, most // 2)
        special = tokenizer.special_tokens
        found = [text for text in _sentences(stage, context) if not any(token in text for token in special)]
        if tokenizer.template is None:
            halves = [tokenizer.encode_document(text)[:-1] for text in found or PROBES]
            prompts = [ids[: max(1, min(len(ids) // 2, most - max_new_tokens))] for ids in halves]
            return cls(tokenizer, found, [], _spread(prompts, stage.answers), max_new_tokens)
        chats = list(_chats(stage))
        if not chats:
            texts = found or list(PROBES)
            chats = [_chat(question, answer) for question, answer in zip(texts, texts[1:] + texts[:1], strict=True)]
        fitting = [
            (chat, prompt) for chat in chats if (prompt := _prompt(tokenizer, chat)) and len(prompt) <= most - max_new_tokens
        ]
        chosen = _spread(fitting or [(_chat("?", "."), tokenizer.encode_prompt(_chat("?", ".")[:-1]))], stage.answers)
        single = [chat for chat, _ in chosen]
        several = [first + second for first, second in pairwise(single)][:TURNS]
        guided = [[{"role": "system", "content": "Answer briefly."}, *single[0]]]
        rendered = [chat for chat in single + several + guided if _prompt(tokenizer, chat)]
        return cls(tokenizer, found, rendered, [prompt for _, prompt in chosen], max_new_tokens)


def _sentences(stage: CheckParity, context: Context) -> Iterator[str]:
    """From the held-out documents of corpora and from files."""
    from llm.chat import read_turns
    from llm.documents import sample_documents
    from llm.errors import InputError
    from llm.parity import sentences

    for corpus in stage.corpora:
        documents = sample_documents(context.open(corpus).validation, CORPUS_BYTES)
        yield from sentences(document.text for document in documents)
    for table in stage.text:
        rows = islice(read_turns(table.files.matches(), TextTemplate(table.text)), MOST_ROWS)
        yield from sentences(turns[-1].content for _, turns, _ in rows if not isinstance(turns, InputError))


def _chats(stage: CheckParity) -> Iterator[Chat]:
    from llm.chat import read_turns
    from llm.errors import InputError

    for table in stage.prompts:
        for _, turns, _ in islice(read_turns(table.files.matches(), table.template), MOST_ROWS):
            if isinstance(turns, InputError):
                if table.on_bad_row == "fail":
                    raise turns
            elif turns[-1].role == "assistant":
                yield [turn.message for turn in turns]


def _chat(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompt(tokenizer: "TextTokenizer", chat: Chat) -> list[int]:
    """The chat's tokens up to its last answer; none where the template refuses it, or it holds a special token."""
    from llm.errors import InputError

    try:
        tokenizer.encode_chat(chat)
        return tokenizer.encode_prompt(chat[:-1])
    except InputError:
        return []


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, evenly spread."""
    return [items[index * len(items) // count] for index in range(count)] if count < len(items) else list(items)


def _until_stopped(context: Context, checks: "Iterator[Check]") -> "Iterator[Check]":
    from llm.errors import Interrupted

    for number, check in enumerate(checks, start=1):
        context.report(done=number, unit="comparisons", note=sentence(**vars(check)))
        yield check
        if context.should_stop():
            raise Interrupted("stopped while systems were compared")

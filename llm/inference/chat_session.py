"""A model to chat with: messages in, pieces of text out; the oldest turns are dropped when the context is full.

Terminals and servers use it; the model comes from a checkpoint folder, and from an adapter's.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from llm.adapters.merge import merge_adapters
from llm.device import main_device, resolve_precision
from llm.errors import InputError
from llm.inference.json_grammar import JsonGrammars
from llm.inference.sampling import Sampling
from llm.inference.streaming import Ending, stream
from llm.inference.timer import GenerationTimer
from llm.inference.token_report import TokenReport, reporter
from llm.models.checkpoint import load_checkpoint
from llm.models.interface import Decoding, LanguageModel, dtype_of
from llm.tokenizer.tokenizer import TextTokenizer

ROOM = 4  # old turns are dropped so that an answer has a quarter of the context


@dataclass(frozen=True)
class AnswerOptions:
    """What is asked of an answer."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()  # texts that end it
    index: int = 0  # of several answers to one prompt, each with its own random numbers
    schema: Mapping[str, Any] | None = None  # the answer is JSON that fits it
    likeliest: int | None = None  # report the tokens, with this many alternatives of each


@dataclass
class Answer:
    """An answer while it is generated: iterate over `pieces`, then read the other fields."""

    pieces: Iterator[str]
    prompt: list[int]
    forgotten: int  # messages at the beginning that did not fit
    ending: Ending
    timer: GenerationTimer = field(default_factory=GenerationTimer)
    reports: list[TokenReport] = field(default_factory=list)  # of the tokens so far, if they were asked for

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, the end token included."""
        return self.timer.new_tokens

    @property
    def is_cut(self) -> bool:
        """Whether it ended because no more tokens were allowed."""
        return self.ending.reason == "length"


def load_model(
    checkpoint: Path, adapter: Path | None = None, *, precision: Literal["auto", "fp32", "bf16"] = "auto"
) -> tuple[LanguageModel, TextTokenizer]:
    """The model of a checkpoint, with an adapter merged if there is one, ready to generate, and its tokenizer."""
    device = main_device()
    dtype = dtype_of(resolve_precision(precision, device=device))
    model = load_checkpoint(checkpoint, dtype=dtype if adapter is None else torch.float32, device=device)
    if adapter is not None:
        merge_adapters(model, [adapter])  # in fp32: what an adapter changes may be less than a step of bf16
        model.to(dtype)
    return model.eval(), TextTokenizer.load(checkpoint)


class ChatSession:
    """A checkpoint, with an adapter or without, ready to generate; `compiled` compiles the decoding step first."""

    def __init__(
        self,
        checkpoint: Path,
        adapter: Path | None = None,
        *,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        compiled: bool = False,
    ) -> None:
        model, self.tokenizer = load_model(checkpoint, adapter, precision=precision)
        self.context = model.context
        self._decoding: Decoding = model.decoding()
        self._grammars: JsonGrammars | None = None  # made for the first answer that needs one
        if compiled:
            with torch.inference_mode():
                self._decoding.compile()

    @property
    def chats(self) -> bool:
        """Whether there is a chat template; without one the model only continues text."""
        return self.tokenizer.template is not None

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: AnswerOptions,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
    ) -> Answer:
        """The assistant's next turn. Of a chat that is too long, the oldest turns but the system's are dropped.

        `tools` are OpenAI's descriptions of functions, and `thinking` whether the answer begins with reasoning, for the chat
        template. InputError where not even the last turn fits.
        """
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = list(messages[len(system) :])
        if not turns:
            raise InputError("messages: expected at least one turn of the user, got none")
        room = max(1, min(options.max_new_tokens, self.context // ROOM))
        for first in range(len(turns)):
            if first and turns[first]["role"] in ("assistant", "tool"):
                continue  # an answer without its question
            kept = [dict(message) for message in (*system, *turns[first:])]
            prompt = self.tokenizer.encode_prompt(kept, tools=tools, thinking=thinking)
            if len(prompt) + room <= self.context:
                return self._generate(prompt, options, forgotten=first)
        if len(prompt) < self.context:
            return self._generate(prompt, options, forgotten=first)
        raise InputError(
            f"messages: expected a last turn that fits the model's context of {self.context} tokens, got {len(prompt)} tokens"
        )

    def continuation(self, text: str | Sequence[int], options: AnswerOptions) -> Answer:
        """The model's continuation of plain text, or of tokens as they are; InputError where they fill the context."""
        prompt = self.tokenizer.encode_document(text)[:-1] if isinstance(text, str) else list(text)
        if unknown := [token for token in prompt if not 0 <= token < self._decoding.vocab_size]:
            raise InputError(f"prompt: expected tokens from 0 to {self._decoding.vocab_size - 1}, got {unknown[0]}")
        if len(prompt) >= self.context:
            raise InputError(f"prompt: expected fewer than the model's context of {self.context} tokens, got {len(prompt)}")
        ends = (*self.tokenizer.ends, self.tokenizer.document_end)
        return self._generate(prompt, options, forgotten=0, ends=ends)

    def _generate(
        self, prompt: list[int], options: AnswerOptions, *, forgotten: int, ends: Collection[int] | None = None
    ) -> Answer:
        constraint = None
        if options.schema is not None:
            self._grammars = self._grammars or JsonGrammars(self.tokenizer, vocab_size=self._decoding.vocab_size)
            constraint = self._grammars.constraint(options.schema)
        timer, ending, reports = GenerationTimer(), Ending(), list[TokenReport]()
        pieces = stream(
            self._decoding,
            prompt,
            tokenizer=self.tokenizer,
            max_new_tokens=options.max_new_tokens,
            end=ends,
            stop=options.stop,
            sampling=options.sampling,
            index=options.index,
            constraint=constraint,
            watch=None if options.likeliest is None else reporter(reports, likeliest=options.likeliest),
            ending=ending,
            timer=timer,
        )
        return Answer(pieces, prompt, forgotten, ending, timer, reports)

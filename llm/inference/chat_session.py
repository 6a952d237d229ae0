"""A model to chat with: messages in, pieces of text out; the oldest turns are dropped when the context is full.

Terminals and servers use it; the model comes from a checkpoint folder, and from an adapter's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from llm.adapters.merge import merge_adapters
from llm.device import resolve_precision
from llm.errors import InputError
from llm.inference.sampling import Sampling
from llm.inference.streaming import stream
from llm.inference.timer import GenerationTimer
from llm.models.checkpoint import load_checkpoint
from llm.models.interface import Decoding, dtype_of
from llm.tokenizer.tokenizer import TextTokenizer

ROOM = 4  # old turns are dropped so that an answer has a quarter of the context


@dataclass
class Answer:
    """An answer while it is generated: iterate over `pieces`, then read the other fields."""

    pieces: Iterator[str]
    prompt_tokens: int
    forgotten: int  # messages at the beginning that did not fit
    limit: int  # tokens that the answer may have
    timer: GenerationTimer = field(default_factory=GenerationTimer)

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, the end token included."""
        return self.timer.new_tokens

    @property
    def is_cut(self) -> bool:
        """Whether it ended because it reached `limit`."""
        return self.timer.new_tokens >= self.limit


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
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype_of(resolve_precision(precision, device=device))
        model = load_checkpoint(checkpoint, dtype=dtype if adapter is None else torch.float32, device=device)
        if adapter is not None:
            merge_adapters(model, [adapter])  # in fp32: what an adapter changes may be less than a step of bf16
            model.to(dtype)
        self.context = model.context
        self.tokenizer = TextTokenizer.load(checkpoint)
        self._decoding: Decoding = model.eval().decoding()
        if compiled:
            with torch.inference_mode():
                self._decoding.compile()

    @property
    def chats(self) -> bool:
        """Whether there is a chat template; without one the model only continues text."""
        return self.tokenizer.template is not None

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Answer:
        """The assistant's next turn. Of a chat that is too long, the oldest turns but the system's are dropped.

        InputError where not even the last turn fits, or a turn has a special token.
        """
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = list(messages[len(system) :])
        if not turns:
            raise InputError("messages: expected at least one turn of the user, got none")
        room = max(1, min(max_new_tokens, self.context // ROOM))
        for first in range(len(turns)):
            if first and turns[first]["role"] == "assistant":
                continue  # an answer without its question
            prompt = self.tokenizer.encode_prompt([dict(message) for message in (*system, *turns[first:])])
            if len(prompt) + room <= self.context:
                return self._generate(prompt, max_new_tokens, sampling, stop, forgotten=first)
        if len(prompt) < self.context:
            return self._generate(prompt, max_new_tokens, sampling, stop, forgotten=first)
        raise InputError(
            f"messages: expected a last turn that fits the model's context of {self.context} tokens, got {len(prompt)} tokens"
        )

    def continuation(
        self, text: str, *, max_new_tokens: int, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Answer:
        """The model's continuation of plain text; InputError where the text fills the context."""
        prompt = [self.tokenizer.begin, *self.tokenizer.encode(text)]
        if len(prompt) >= self.context:
            raise InputError(f"prompt: expected fewer than the model's context of {self.context} tokens, got {len(prompt)}")
        return self._generate(prompt, max_new_tokens, sampling, stop, forgotten=0)

    def _generate(
        self, prompt: list[int], max_new_tokens: int, sampling: Sampling | None, stop: Sequence[str], *, forgotten: int
    ) -> Answer:
        timer = GenerationTimer()
        pieces = stream(
            self._decoding,
            prompt,
            tokenizer=self.tokenizer,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=sampling,
            timer=timer,
        )
        return Answer(pieces, len(prompt), forgotten, min(max_new_tokens, self.context - len(prompt)), timer)

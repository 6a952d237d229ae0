"""A model that one talks to: messages in, pieces of text out, with the oldest turns forgotten once the context is full.

Where the model comes from is a folder's business, and who talks (a terminal, a server) somebody else's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llm.adapters.merge import merge_adapters
from llm.errors import InputError
from llm.inference.generate import GenerationTimer
from llm.inference.sampling import Sampling
from llm.inference.streaming import stream
from llm.models.checkpoint import load_checkpoint
from llm.models.interface import Decoding
from llm.tokenizer.tokenizer import TextTokenizer

ROOM = 4  # old turns are forgotten so that an answer has this part of the context: a quarter


@dataclass
class Answer:
    """An answer while it is written: iterate over `pieces`, then look at the rest."""

    pieces: Iterator[str]
    prompt_tokens: int
    forgotten: int  # messages at the beginning that did not fit any more
    limit: int  # tokens that the answer may have
    timer: GenerationTimer = field(default_factory=GenerationTimer)

    @property
    def new_tokens(self) -> int:
        """Tokens written so far, the end token included."""
        return self.timer.new_tokens

    @property
    def is_cut(self) -> bool:
        """Whether it ended because it was as long as it may be."""
        return self.timer.new_tokens >= self.limit


class ChatSession:
    """A checkpoint, with an adapter or without, ready to write; `compiled` if the step that writes is to be compiled first."""

    def __init__(self, checkpoint: Path, adapter: Path | None = None, *, compiled: bool = False) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_checkpoint(checkpoint, device=device)
        if adapter is not None:
            merge_adapters(model, [adapter])
        self.context = model.context
        self.tokenizer = TextTokenizer.load(checkpoint)
        self._decoding: Decoding = model.eval().decoding()
        if compiled:
            with torch.inference_mode():
                self._decoding.compile()

    @property
    def chats(self) -> bool:
        """Whether there is a chat template; without one a model goes on with text, and that is all."""
        return self.tokenizer.template is not None

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Answer:
        """The assistant's next turn. Of a chat that is too long, the oldest turns but the system's are left out.

        InputError where not even the last turn fits, or a turn holds a special token.
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
                return self._go_on(prompt, max_new_tokens, sampling, stop, forgotten=first)
        if len(prompt) < self.context:
            return self._go_on(prompt, max_new_tokens, sampling, stop, forgotten=first)
        raise InputError(
            f"messages: expected a last turn that fits the model's context of {self.context} tokens, got {len(prompt)} tokens"
        )

    def continuation(
        self, text: str, *, max_new_tokens: int, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Answer:
        """How the model goes on with plain text; InputError where it fills the context."""
        prompt = [self.tokenizer.begin, *self.tokenizer.encode(text)]
        if len(prompt) >= self.context:
            raise InputError(f"prompt: expected fewer than the model's context of {self.context} tokens, got {len(prompt)}")
        return self._go_on(prompt, max_new_tokens, sampling, stop, forgotten=0)

    def _go_on(
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

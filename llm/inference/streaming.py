"""Text from a model while it is generated, in pieces that never end inside a character.

A token is bytes, and a character outside ASCII has two to four, so a token may end inside one. Works with every tokenizer that
decodes such an incomplete end as U+FFFD, byte-level or with byte fallback. The tokens come from `llm.inference.generate`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llm.errors import InputError
from llm.inference.generate import generate_one
from llm.inference.sampling import Constraint, Sampling
from llm.inference.timer import GenerationTimer
from llm.models.interface import Decoding, LanguageModel
from llm.tokenizer.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"  # incomplete characters decode to it
MOST_REPLACEMENTS = 3  # bytes of a character without its last; with byte fallback each of them decodes to one


@dataclass
class Ending:
    """Why a text ended: at an end token or a stop text, or because no more tokens were allowed."""

    reason: Literal["stop", "length"] = "length"

    def at_stop(self) -> None:
        """Note that the text ended by itself."""
        self.reason = "stop"


def stream(
    model: LanguageModel | Decoding,
    prompt: Sequence[int],
    *,
    tokenizer: TextTokenizer,
    max_new_tokens: int,
    end: Collection[int] | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    index: int = 0,
    constraint: Constraint | None = None,
    watch: Callable[[Tensor, int], None] | None = None,
    ending: Ending | None = None,
    timer: GenerationTimer | None = None,
) -> Iterator[str]:
    """Pieces of the text that `generate_one` gives for `prompt`: joined, they are what its tokens decode to.

    It ends before the first token of `end` (by default the tokenizer's end tokens), before the first of the texts `stop`, or
    after `max_new_tokens`; `ending` tells which. Closing the iterator ends the work. InputError as for `generate`.
    """
    if "" in stop:
        raise InputError("stop: expected texts of at least one character, got an empty one")
    end = tokenizer.ends if end is None else end
    ending = ending or Ending()
    tokens = generate_one(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        end=end,
        sampling=sampling,
        index=index,
        constraint=constraint,
        watch=watch,
        on_end=ending.at_stop,
        timer=timer,
    )
    return until_stop(pieces(tokens, decode=tokenizer.decode), stop, on_stop=ending.at_stop)


def pieces(tokens: Iterator[int], *, decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of `tokens`, in pieces that end between characters; none is empty.

    Holds back only the bytes of an incomplete character. Bytes that never make a character come out as U+FFFD.
    """
    kept: list[int] = []  # the tokens of the last whole piece, which decide about spaces at its end, and those after it
    whole = 0  # how many of them make that piece
    given = ""  # the part of the text after it that was yielded
    for token in tokens:
        kept.append(token)
        text = _text_after(kept, whole, decode=decode)
        ready = _without_incomplete_end(text)
        if piece := ready[len(given) :]:
            yield piece
            given = ready
        if ready == text and text:
            kept, whole, given = kept[whole:], len(kept) - whole, ""
    if piece := _text_after(kept, whole, decode=decode)[len(given) :]:
        yield piece


def _text_after(tokens: Sequence[int], whole: int, *, decode: Callable[[Sequence[int]], str]) -> str:
    """The text of `tokens` after the first `whole` of them."""
    before, text = decode(tokens[:whole]), decode(tokens)
    # With byte fallback, invalid bytes also change the decoding of whole characters before them, which were yielded.
    return text[len(before) :] if text.startswith(before) else decode(tokens[whole:])


def _without_incomplete_end(text: str) -> str:
    kept = text.rstrip(REPLACEMENT)
    return text[: max(len(kept), len(text) - MOST_REPLACEMENTS)]


def until_stop(texts: Iterator[str], stop: Sequence[str], *, on_stop: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The texts up to the first occurrence of one of `stop`, which `on_stop` is told; holds back what may begin one."""
    held = ""
    for text in texts:
        held += text
        found = [place for place in map(held.find, stop) if place >= 0]
        if found:
            held = held[: min(found)]
            on_stop()
            break
        begun = max((size for one in stop for size in range(1, len(one)) if held.endswith(one[:size])), default=0)
        if begun < len(held):
            yield held[: len(held) - begun]
            held = held[len(held) - begun :]
    if held:
        yield held

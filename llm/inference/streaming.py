"""Text from a model while it is written: in pieces that never end inside a character, as soon as their characters are whole.

A token is bytes, and a character outside ASCII has two to four, so a token may end in the middle of one. Works with every
tokenizer that decodes such a torn end as U+FFFD, byte-level or with byte fallback. The tokens are `llm.inference.generate`'s.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from llm.errors import InputError
from llm.inference.generate import GenerationTimer, generate_one
from llm.inference.sampling import Sampling
from llm.models.interface import Decoding, LanguageModel
from llm.tokenizer.tokenizer import TextTokenizer

TORN = "\ufffd"  # what bytes that are no character decode to
LONGEST_TORN = 3  # bytes of a character that lacks its last; with byte fallback each of them decodes to one TORN


def stream(
    model: LanguageModel | Decoding,
    prompt: Sequence[int],
    *,
    tokenizer: TextTokenizer,
    max_new_tokens: int,
    end: Collection[int] | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    timer: GenerationTimer | None = None,
) -> Iterator[str]:
    """Pieces of the text that `generate` gives for `prompt` alone: joined, they are what its tokens decode to.

    It ends before the first token of `end` (by default the tokenizer's end tokens), before the first of the texts `stop`, or
    after `max_new_tokens`. Closing the iterator ends the work. InputError as for `generate`.
    """
    if "" in stop:
        raise InputError("stop: expected texts of at least one character, got an empty one")
    end = tokenizer.ends if end is None else end
    tokens = generate_one(model, prompt, max_new_tokens=max_new_tokens, end=end, sampling=sampling, timer=timer)
    return until(pieces(tokens, decode=tokenizer.decode), stop)


def pieces(tokens: Iterator[int], *, decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of `tokens`, in pieces that end between characters; none is empty.

    Held back are only the bytes of a character that is not whole yet. Bytes that never make a character come out as U+FFFD.
    """
    kept: list[int] = []  # the tokens of the last whole piece, which decide about spaces at its end, and those after it
    whole = 0  # how many of them make that piece
    given = ""  # what was given of the text behind it
    for token in tokens:
        kept.append(token)
        text = _behind(kept, whole, decode=decode)
        ready = _without_torn_end(text)
        if piece := ready[len(given) :]:
            yield piece
            given = ready
        if ready == text and text:
            kept, whole, given = kept[whole:], len(kept) - whole, ""
    if piece := _behind(kept, whole, decode=decode)[len(given) :]:
        yield piece


def _behind(tokens: Sequence[int], whole: int, *, decode: Callable[[Sequence[int]], str]) -> str:
    """The text of `tokens` behind the first `whole` of them."""
    before, text = decode(tokens[:whole]), decode(tokens)
    # With byte fallback, bytes that make no character take whole ones before them along; those were given.
    return text[len(before) :] if text.startswith(before) else decode(tokens[whole:])


def _without_torn_end(text: str) -> str:
    kept = text.rstrip(TORN)
    return text[: max(len(kept), len(text) - LONGEST_TORN)]


def until(texts: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The texts up to the first occurrence of one of `stop`. What may be the beginning of one is held back until it is not."""
    held = ""
    for text in texts:
        held += text
        found = [place for place in map(held.find, stop) if place >= 0]
        if found:
            held = held[: min(found)]
            break
        begun = max((size for one in stop for size in range(1, len(one)) if held.endswith(one[:size])), default=0)
        if begun < len(held):
            yield held[: len(held) - begun]
            held = held[len(held) - begun :]
    if held:
        yield held

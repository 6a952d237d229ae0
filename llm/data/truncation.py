"""Chats cut to the length of a row: later turns first, then text of the data that the assistant does not say.

`fit` cuts one chat, `fit_all` the chats that share a prompt, such as the two answers of a preference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm.data.turn import Turn
from llm.tokenizer.tokenizer import TextTokenizer

Encoded = tuple[list[int], list[bool]]  # ids and loss mask
Long = Literal["cut", "window", "fail"]  # what to do with a document to classify that is too long
SLACK = 2  # tokens of a window that are left free, since the ends of a piece may split into other tokens
SHORTEST_WINDOW = 8  # tokens of the document


@dataclass(frozen=True)
class Stream:
    """A chat as tokens that fit a row."""

    messages: list[dict[str, Any]]
    ids: list[int]
    loss_mask: list[bool]  # true where the loss counts the prediction of `ids`: the assistant's text and the end of its turn
    full_length: int  # tokens before the cut
    cut_prompt: bool = False
    cut_response: bool = False
    cut_turns: int = 0  # left out at the end

    @property
    def is_cut(self) -> bool:
        """Whether anything is missing."""
        return self.cut_prompt or self.cut_response or self.cut_turns > 0

    @property
    def answer_start(self) -> int:
        """The index of the first token of the last answer, with which the stream ends."""
        start = len(self.ids)
        while start and self.loss_mask[start - 1]:
            start -= 1
        return start


def fit(
    turns: Sequence[Turn],
    tokenizer: TextTokenizer,
    *,
    positions: int,
    encoded: Encoded | None = None,
    leave_out_turns: bool = False,
) -> Stream:
    """The chat as at most `positions` + 1 tokens. `encoded` is the whole chat, if it is known already.

    With `leave_out_turns`, a longer chat keeps its first learned answers whole, with what is said before them, and loses the
    turns after those; only a first answer that does not fit is treated like the answer of a chat that has no other.

    Otherwise a longer chat loses the ends of the texts that were substituted into turns other than the assistant's, the
    longest first, until it fits. If the assistant's turns do not fit by themselves, these texts keep half of the room together
    and the stream is cut at the end of the row: it then has no end token, because the answer goes on.
    """
    whole = encoded or _encode(turns, tokenizer)
    full_length = len(whole[0])
    if full_length <= positions + 1:
        return Stream([turn.message for turn in turns], *whole, full_length)
    if leave_out_turns:
        kept = _first_answers(turns, tokenizer, limit=positions + 1)
        cut = len(turns) - len(kept)
        if cut:
            shorter = fit(kept, tokenizer, positions=positions)
            return replace(shorter, full_length=full_length, cut_turns=cut)
    texts = [text for turn in turns for text in turn.substituted()]
    limit, cuts = positions + 1, tokenizer.cuts(texts)
    alone = len(_encode(_refilled(turns, [""] * len(texts)), tokenizer)[0])  # tokens that may not be cut
    room = limit - alone if alone <= limit else limit // 2
    while True:
        cap = _largest_cap([len(ends) for ends in cuts], total=room)
        cut_texts = [_head(text, ends, cap) for text, ends in zip(texts, cuts, strict=True)]
        shortened = _refilled(turns, cut_texts)
        ids, loss_mask = _encode(shortened, tokenizer)
        excess = len(ids) - limit
        if excess <= 0 or alone > limit or room == 0:
            break
        room = max(0, room - excess)  # the cut has changed how text splits into tokens
    return Stream(
        [turn.message for turn in shortened],
        ids[:limit],
        loss_mask[:limit],
        full_length,
        cut_prompt=cut_texts != texts,
        cut_response=excess > 0,
    )


def windows(turns: Sequence[Turn], tokenizer: TextTokenizer, *, positions: int) -> list[list[Turn]]:
    """A chat with one answer as chats that fit, each with a piece of its longest substituted text and the same answer; the
    pieces follow each other. The chat itself if it fits, has several answers, or leaves no room for a piece.
    """
    texts = [text for turn in turns for text in turn.substituted()]
    fits = len(_encode(turns, tokenizer)[0]) <= positions + 1
    if fits or not texts or sum(turn.role == "assistant" for turn in turns) != 1:
        return [list(turns)]
    cuts = tokenizer.cuts(texts)
    place = max(range(len(texts)), key=lambda index: len(cuts[index]))
    text, ends = texts[place], [0, *cuts[place]]
    alone = len(_encode(_refilled(turns, [*texts[:place], "", *texts[place + 1 :]]), tokenizer)[0])
    room = positions + 1 - alone - SLACK
    if room < SHORTEST_WINDOW:
        return [list(turns)]
    pieces = [text[ends[at] : ends[min(at + room, len(ends) - 1)]] for at in range(0, len(ends) - 1, room)]
    return [_refilled(turns, [*texts[:place], piece, *texts[place + 1 :]]) for piece in pieces if piece.strip()]


def _first_answers(turns: Sequence[Turn], tokenizer: TextTokenizer, *, limit: int) -> Sequence[Turn]:
    """The turns up to the last answer with which they have at most `limit` tokens; at least up to the first answer."""
    ends = [number for number, turn in enumerate(turns, start=1) if turn.role == "assistant" and turn.is_learned]
    low, high = 0, len(ends) - 1  # of the answers that may be the last one
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(_encode(turns[: ends[middle]], tokenizer)[0]) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return turns[: ends[low]] if ends else turns


def _encode(turns: Sequence[Turn], tokenizer: TextTokenizer) -> Encoded:
    return tokenizer.encode_chat([turn.message for turn in turns])


def _refilled(turns: Sequence[Turn], texts: Sequence[str]) -> list[Turn]:
    remaining = iter(texts)
    return [turn.with_substituted(remaining) for turn in turns]


def _largest_cap(lengths: Sequence[int], *, total: int) -> int:
    """The largest n for which lengths cut to n sum to at most `total`."""
    left, kept = total, len(lengths)
    for length in sorted(lengths):
        if length * kept > left:
            return left // kept
        left -= length
        kept -= 1
    return max(lengths, default=0)


def _head(text: str, ends: Sequence[int], count: int) -> str:
    """The beginning of `text` that its first `count` tokens spell."""
    return text if len(ends) <= count else text[: ends[count - 1]] if count else ""


def _cuttable(message: dict[str, Any]) -> Turn:
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    return Turn(message["role"], ("", message["content"], ""), more)


def fit_all(
    chats: Sequence[Sequence[Turn]], encoded: Sequence[Encoded], tokenizer: TextTokenizer, *, positions: int
) -> list[Stream]:
    """`fit` for chats that share their prompt, cut in all of them as in the longest one; a chat alone may lose turns."""
    if len(chats) == 1:
        return [fit(chats[0], tokenizer, positions=positions, encoded=encoded[0], leave_out_turns=True)]
    order = sorted(range(len(chats)), key=lambda index: -len(encoded[index][0]))
    longest = fit(chats[order[0]], tokenizer, positions=positions, encoded=encoded[order[0]])
    streams = {order[0]: longest}
    for index in order[1:]:
        if longest.cut_prompt:
            prompt = [_cuttable(message) for message in longest.messages[:-1]]
            shortened = fit([*prompt, chats[index][-1]], tokenizer, positions=positions)
            streams[index] = replace(shortened, full_length=len(encoded[index][0]), cut_prompt=True)
        else:
            streams[index] = fit(chats[index], tokenizer, positions=positions, encoded=encoded[index])
    return [streams[index] for index in range(len(chats))]

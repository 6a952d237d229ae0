"""Chats cut to a length: what is substituted into a prompt is shortened, never the response."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llm.data.conversations import Turn
from llm.tokenizer.tokenizer import TextTokenizer

Encoded = tuple[list[int], list[bool]]  # ids, and which of them are learned


@dataclass(frozen=True)
class Stream:
    """A chat as tokens that fit a row."""

    messages: list[dict[str, str]]
    ids: list[int]
    learned: list[bool]  # which of `ids` are to be predicted: the assistant's text and the end of its turn
    full_length: int  # tokens before anything was cut
    cut_prompt: bool = False
    cut_response: bool = False


def fit(turns: Sequence[Turn], tokenizer: TextTokenizer, *, positions: int, encoded: Encoded | None = None) -> Stream:
    """The chat as at most `positions` + 1 tokens. `encoded` is the whole chat, where it is known already.

    Where it is longer, the texts that were substituted into what the assistant does not say lose their ends, the longest
    first, until it fits. Where the assistant's turns do not fit even alone, these texts keep half of the room together and
    the stream is cut where the row ends: it then lacks the end token, because the answer goes on.
    """
    limit = positions + 1
    ids, learned = encoded or _encode(turns, tokenizer)
    full_length = len(ids)
    if full_length <= limit:
        return Stream([turn.message for turn in turns], ids, learned, full_length)
    texts = [text for turn in turns for text in turn.substituted()]
    tokens = tokenizer.encode_batch(texts)
    alone = len(_encode(_refilled(turns, [""] * len(texts)), tokenizer)[0])  # of what may not be cut
    room = limit - alone if alone <= limit else limit // 2
    while True:
        cap = _largest_cap([len(spelled) for spelled in tokens], total=room)
        cut = [_head(text, spelled, cap, tokenizer) for text, spelled in zip(texts, tokens, strict=True)]
        shortened = _refilled(turns, cut)
        ids, learned = _encode(shortened, tokenizer)
        excess = len(ids) - limit
        if excess <= 0 or alone > limit or room == 0:
            break
        room = max(0, room - excess)  # the cut has moved the borders between tokens
    return Stream(
        [turn.message for turn in shortened],
        ids[:limit],
        learned[:limit],
        full_length,
        cut_prompt=cut != texts,
        cut_response=excess > 0,
    )


def _encode(turns: Sequence[Turn], tokenizer: TextTokenizer) -> tuple[list[int], list[bool]]:
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


def _head(text: str, tokens: Sequence[int], count: int, tokenizer: TextTokenizer) -> str:
    """The beginning of `text` that the first `count` of its tokens spell, without a character that they spell only in part."""
    if len(tokens) <= count:
        return text
    head = tokenizer.decode(tokens[:count])
    while not text.startswith(head):
        head = head[:-1]
    return head


def fit_all(
    chats: Sequence[Sequence[Turn]], encoded: Sequence[Encoded], tokenizer: TextTokenizer, *, positions: int
) -> list[Stream]:
    """The chats of one row, whose prompts are one: it is cut to what the longest chat leaves of it."""
    order = sorted(range(len(chats)), key=lambda index: -len(encoded[index][0]))
    longest = fit(chats[order[0]], tokenizer, positions=positions, encoded=encoded[order[0]])
    streams = {order[0]: longest}
    for index in order[1:]:
        if longest.cut_prompt:
            prompt = [Turn(message["role"], ("", message["content"], "")) for message in longest.messages[:-1]]
            shortened = fit([*prompt, chats[index][-1]], tokenizer, positions=positions)
            streams[index] = replace(shortened, full_length=len(encoded[index][0]), cut_prompt=True)
        else:
            streams[index] = fit(chats[index], tokenizer, positions=positions, encoded=encoded[index])
    return [streams[index] for index in range(len(chats))]

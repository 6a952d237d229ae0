"""Chats cut to the length of a row: text from the data is cut where the assistant does not say it, and never its response.

`fit` cuts one chat, `fit_all` the chats that share a prompt, such as the two answers of a preference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llm.data.conversations import Turn
from llm.tokenizer.tokenizer import TextTokenizer

Encoded = tuple[list[int], list[bool]]  # ids and loss mask


@dataclass(frozen=True)
class Stream:
    """A chat as tokens that fit a row."""

    messages: list[dict[str, str]]
    ids: list[int]
    loss_mask: list[bool]  # true where the loss counts the prediction of `ids`: the assistant's text and the end of its turn
    full_length: int  # tokens before the cut
    cut_prompt: bool = False
    cut_response: bool = False

    @property
    def answer_start(self) -> int:
        """The index of the first token of the last answer, with which the stream ends."""
        start = len(self.ids)
        while start and self.loss_mask[start - 1]:
            start -= 1
        return start


def fit(turns: Sequence[Turn], tokenizer: TextTokenizer, *, positions: int, encoded: Encoded | None = None) -> Stream:
    """The chat as at most `positions` + 1 tokens. `encoded` is the whole chat, if it is known already.

    A longer chat loses the ends of the texts that were substituted into turns other than the assistant's, the longest first,
    until it fits. If the assistant's turns do not fit by themselves, these texts keep half of the room together and the stream
    is cut at the end of the row: it then has no end token, because the answer goes on.
    """
    limit = positions + 1
    ids, loss_mask = encoded or _encode(turns, tokenizer)
    full_length = len(ids)
    if full_length <= limit:
        return Stream([turn.message for turn in turns], ids, loss_mask, full_length)
    texts = [text for turn in turns for text in turn.substituted()]
    tokens = tokenizer.encode_batch(texts)
    alone = len(_encode(_refilled(turns, [""] * len(texts)), tokenizer)[0])  # tokens that may not be cut
    room = limit - alone if alone <= limit else limit // 2
    while True:
        cap = _largest_cap([len(spelled) for spelled in tokens], total=room)
        cut = [_head(text, spelled, cap, tokenizer) for text, spelled in zip(texts, tokens, strict=True)]
        shortened = _refilled(turns, cut)
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
        cut_prompt=cut != texts,
        cut_response=excess > 0,
    )


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


def _head(text: str, tokens: Sequence[int], count: int, tokenizer: TextTokenizer) -> str:
    """The beginning of `text` that its first `count` tokens spell, up to the last whole character."""
    if len(tokens) <= count:
        return text
    head = tokenizer.decode(tokens[:count])
    while not text.startswith(head):
        head = head[:-1]
    return head


def fit_all(
    chats: Sequence[Sequence[Turn]], encoded: Sequence[Encoded], tokenizer: TextTokenizer, *, positions: int
) -> list[Stream]:
    """`fit` for chats that share their prompt, which is cut in all of them as in the longest chat."""
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

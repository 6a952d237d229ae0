"""What a model thought of each token of an answer: its log-probability, and those of the likeliest instead.

Log-probabilities are the model's own, before temperature, penalties and constraints.

Letters: V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from llm.device import widened
from llm.tokenizer.tokenizer import TextTokenizer


@dataclass(frozen=True)
class TokenReport:
    """A token of an answer, and its `likeliest` alternatives, the likeliest first."""

    token: int
    log_probability: float
    likeliest: tuple[tuple[int, float], ...]  # token, log-probability


def reporter(found: list[TokenReport], *, likeliest: int) -> Callable[[Tensor, int], None]:
    """Adds a report of each token to `found`, with that many alternatives; called with logits (V,) and the token chosen."""

    def watch(logits: Tensor, token: int) -> None:
        scores = widened(logits).log_softmax(-1)
        top = scores.topk(min(likeliest, len(scores)))
        alternatives = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        found.append(TokenReport(token, float(scores[token]), alternatives))

    return watch


def token_bytes(tokenizer: TextTokenizer, token: int) -> bytes:
    """The bytes of text that a token stands for: of a special token its name, of one outside the vocabulary none."""
    if token >= tokenizer.vocab_size:
        return b""
    text = tokenizer.decode([token], special=True)
    if "\ufffd" not in text:
        return text.encode()
    piece = tokenizer.piece(token)
    if len(piece) == len("<0x00>") and piece.startswith("<0x"):  # byte fallback
        return bytes([int(piece[3:5], 16)])
    known = _byte_alphabet()
    return bytes(known[character] for character in piece) if known.keys() >= set(piece) else text.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level vocabularies (Radford et al. 2019): printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}

"""Control tokens: those that only a chat template may write, such as `<|im_end|>` and `<think>`; what a user types is text.

Before a template is rendered, each character of the messages that could begin a control token is replaced by a stand-in, a
character for private use. So the text keeps its length, and templates trim, split and escape it as they do any other; no
control token can be made of what is typed, not even together with the text beside it. Where that would happen, the tokenizer
`restoring` looks for control tokens first, and only then reads stand-ins as the characters that they stand for.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from llm.errors import InputError

_FIRST_STAND_IN = 0x10F000
_SHAPE = re.compile(r"<.+>|\[/?[A-Z_]+\]", re.DOTALL)
_MARKUP = re.compile(r"[<>\[\]|｜]")
_HTML = re.compile(
    r"</?(a|b|blockquote|br|caption|code|col|colgroup|dd|del|div|dl|dt|em|h[1-6]|hr|i|img|ins|li|mark|ol|p|pre|s|small|span|strong"
    r"|sub|sup|table|tbody|td|tfoot|th|thead|tr|tt|u|ul)>"
)


class ControlTokens:
    """The control tokens of a vocabulary and of its chat template: all special ones, and of the other added tokens those that
    the template writes or that look like one. The rest, such as HTML's tags in Gemma and runs of spaces, are ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None) -> None:
        self._tokenizer = tokenizer
        added = [(token.content, token.special) for token in tokenizer.get_added_tokens_decoder().values()]
        found = [token for token, special in added if special or _is_control(token, template or "")]
        self._control = frozenset(found)
        self.special = frozenset(token for token, special in added if special)
        self.any = re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or r"(?!)")
        firsts = sorted({token[0] for token in found})
        self._stand_ins = {first: chr(_FIRST_STAND_IN + number) for number, first in enumerate(firsts)}
        self._risky = re.compile(f"[{''.join(map(re.escape, firsts))}]") if firsts else self.any
        self._reserved = re.compile(f"[{''.join(self._stand_ins.values())}]") if firsts else self.any
        self._ordinary = frozenset(token for token, _ in added if token not in self._control and token[0] in self._stand_ins)
        self._lengths = sorted({len(token) for token in self._ordinary})

    def is_risky(self, text: str) -> bool:
        """Whether the text has a character that begins a control token."""
        return self._risky.search(text) is not None

    def protected(self, value: Any) -> Any:
        """A text, or all texts in a JSON value, with stand-ins; InputError for a text that has stand-ins already."""
        if isinstance(value, str):
            if (found := self._reserved.search(value)) is not None:
                raise InputError(f"expected text without U+{ord(found.group()):X}, a character for private use, got one")
            return self._risky.sub(lambda match: self._stand_in(match, value), value) if self._ordinary else self._all(value)
        if isinstance(value, Mapping):
            return {self.protected(name): self.protected(of_it) for name, of_it in value.items()}
        return [self.protected(item) for item in value] if isinstance(value, list | tuple) else value

    def restored(self, text: str) -> str:
        """The text as it was typed, of the same length."""
        for first, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, first)
        return text

    def unless_forged(self, text: str) -> str | None:
        """`restored` of a rendered text; None if what was typed then reads as a control token, so that only `restoring` may
        encode it.
        """
        if self._reserved.search(text) is None:
            return text
        found = self.restored(text)
        forged = any(match.group() != text[match.start() : match.end()] for match in self.any.finditer(found))
        return None if forged else found

    @cached_property
    def restoring(self) -> Tokenizer:
        """The tokenizer, for texts with stand-ins: control tokens are found before these become what they stand for."""
        stored = json.loads(self._tokenizer.to_str())
        for token in stored["added_tokens"]:
            token["normalized"] = token["normalized"] and token["content"] not in self._control
        replaced = [
            {"type": "Replace", "pattern": {"String": stand_in}, "content": first}
            for first, stand_in in self._stand_ins.items()
        ]
        own = [] if stored["normalizer"] is None else [stored["normalizer"]]
        stored["normalizer"] = {"type": "Sequence", "normalizers": [*replaced, *own]}
        return Tokenizer.from_str(json.dumps(stored))

    def _all(self, text: str) -> str:
        for first, stand_in in self._stand_ins.items():
            text = text.replace(first, stand_in)
        return text

    def _stand_in(self, match: re.Match[str], text: str) -> str:
        at = match.start()
        if any(text[at : at + length] in self._ordinary for length in self._lengths):
            return match.group()
        return self._stand_ins[match.group()]


def _is_control(token: str, template: str) -> bool:
    if _SHAPE.fullmatch(token) is not None:
        return _HTML.fullmatch(token) is None
    return token in template and _MARKUP.search(token) is not None

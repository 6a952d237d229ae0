"""Personal data in text: e-mail addresses, telephone numbers, and numbers of persons, cards and accounts. Found, or replaced.

Simple patterns, with the check digits where there are any. They miss names and addresses, and may find what is none: a hint of
where to look, no proof in either direction.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

PersonalKind = Literal["email", "identity", "account", "card", "social_security", "telephone"]  # longer numbers first

LOOKED_AT = 20_000  # characters of a text, for hints

_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # of GB 11643-1999


def _luhn(text: str) -> bool:
    """Whether the last digit is right (ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in reversed(text) if digit.isdecimal()]
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(digits)]
    return len(digits) >= 13 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _chinese(text: str) -> bool:
    """Whether the last character is right (GB 11643-1999)."""
    return (
        "10X98765432"[sum(int(digit) * weight for digit, weight in zip(text, _WEIGHTS, strict=False)) % 11] == text[17].upper()
    )


def _iban(text: str) -> bool:
    """Whether the remainder is right (ISO 13616)."""
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(one, 36)) for one in plain[4:] + plain[:4])) % 97 == 1


def _telephone(text: str) -> bool:
    return 8 <= sum(one.isdecimal() for one in text) <= 15


NAMES: dict[PersonalKind, str] = {
    "email": "e-mail address",
    "telephone": "telephone number",
    "identity": "identity number",
    "social_security": "social security number",
    "card": "card number",
    "account": "account number",
}
KINDS: dict[PersonalKind, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63}){1,4}", re.ASCII), bool),
    "telephone": (
        re.compile(
            r"(?<![\w.+])(?:\+\d{1,3}[ /-]?(?:\(\d{1,4}\)[ -]?)?\d{1,4}(?:[ /-]?\d{2,4}){1,4}"
            r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4}|0\d{2,3}-\d{7,8}|1[3-9]\d{9})(?![\w])",
            re.ASCII,
        ),
        _telephone,
    ),
    "identity": (re.compile(r"(?<!\w)[1-9]\d{5}(?:19|20)\d{9}[\dXx](?!\w)", re.ASCII), _chinese),
    "social_security": (re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])", re.ASCII), bool),
    "card": (re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])", re.ASCII), _luhn),
    "account": (re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){2,7}(?: ?[A-Z\d]{1,3})?(?!\w)", re.ASCII), _iban),
}
_PERHAPS = re.compile(r"@|\d{2}")  # what every kind has, found faster


def redact(text: str, kinds: Sequence[PersonalKind] = get_args(PersonalKind)) -> str:
    """The text with each piece of personal data of these kinds replaced by the kind's name in brackets: [e-mail address]."""
    if not _PERHAPS.search(text):
        return text
    for kind in kinds:
        pattern, is_right = KINDS[kind]
        text = pattern.sub(partial(_named, name=NAMES[kind], is_right=is_right), text)
    return text


def _named(found: re.Match[str], *, name: str, is_right: Callable[[str], bool]) -> str:
    return f"[{name}]" if is_right(found[0]) else found[0]


@dataclass
class PersonalData:
    """How many texts hold each kind, and where the first is; the data itself is not kept."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, tuple[str, str]] = field(default_factory=dict)  # place and field

    def add(self, text: str, field: str, place: str) -> None:
        """Look at the beginning of a text."""
        if not _PERHAPS.search(text, 0, LOOKED_AT):
            return
        for kind, (pattern, is_right) in KINDS.items():
            name = NAMES[kind]
            if any(is_right(found[0]) for found in pattern.finditer(text, 0, LOOKED_AT)):
                self.counts[name] = self.counts.get(name, 0) + 1
                self.first.setdefault(name, (place, field))

    def as_json(self) -> dict[str, Any]:
        """By kind."""
        return {
            kind: {"texts": number, "first": self.first[kind][0], "field": self.first[kind][1]}
            for kind, number in self.counts.items()
        }

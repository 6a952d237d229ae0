"""Templates over the fields of a row, such as `"Which section?\\n{text}"`.

This module is imported while planning, so it imports nothing that is slow.
"""

import json
from collections.abc import Mapping
from functools import cache
from string import Formatter
from typing import Any

from llm.errors import InputError


@cache
def split_template(template: str) -> tuple[str, ...]:
    """Fixed text and names of fields in turn: `"a {b} c"` gives `("a ", "b", " c")`; literal braces are doubled.

    A name is all that is between the braces, also "Review Text" or "Note: text". ValueError if braces do not match or are
    empty.
    """
    parts = [""]
    try:
        for literal, field, form, conversion in Formatter().parse(template):
            parts[-1] += literal
            if field is None:
                continue
            name = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            if not name.strip() or "{" in name:
                raise ValueError(f"expected the name of a field in braces, got {name!r}")
            parts += [name, ""]
    except ValueError as error:
        raise ValueError(f"{template!r} is not a template: {error} (double a literal brace)") from None
    return tuple(parts)


@cache
def split_text(text: str) -> tuple[str, ...]:
    """`split_template` for a setting that always names a field; without braces it is the name: `"body"` for `"{body}"`."""
    return ("", text, "") if "{" not in text else with_field(text)


def with_field(template: str) -> tuple[str, ...]:
    """`split_template`, with a ValueError if no field is named, because every row would give the same text."""
    parts = split_template(template)
    if len(parts) == 1:
        raise ValueError(
            f"{template!r}: expected the name of a field in braces, such as {{text}}, got the same text for every row"
        )
    return parts


def text_of(fields: Mapping[str, Any], parts: tuple[str, ...]) -> str:
    """Fixed text and values of fields, joined; `parts` are those of `split_text`."""
    return "".join(_value(fields, part) if place % 2 else part for place, part in enumerate(parts))


def _value(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise InputError(f"expected the field {name!r}, got only {', '.join(map(repr, fields)) or 'no field'}")
    if not isinstance(value := fields[name], str):
        shown = json.dumps(value, ensure_ascii=False, default=str)
        raise InputError(f"field {name!r}: expected a string, got {shown[:80]}")
    return value

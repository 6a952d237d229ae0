"""Templates over the fields of a row: `"Which section?\\n{text}"`. What is made of a filled one is the caller's business.

This module is imported while planning, so it imports nothing that is slow.
"""

from functools import cache
from string import Formatter


@cache
def split_template(template: str) -> tuple[str, ...]:
    """Fixed text and names of fields in turn: `"a {b} c"` gives `("a ", "b", " c")`; braces are written double.

    Raises ValueError where braces do not match or hold something other than a name.
    """
    parts = [""]
    try:
        for literal, field, form, conversion in Formatter().parse(template):
            parts[-1] += literal
            if field is None:
                continue
            if not field.isidentifier() or form or conversion:
                raise ValueError("between braces it: expected the name of a field, and nothing else")
            parts += [field, ""]
    except ValueError as error:
        raise ValueError(f"{template!r} is not a template: {error} (a brace that is meant literally is doubled)") from None
    return tuple(parts)


@cache
def split_text(text: str) -> tuple[str, ...]:
    """The same of a setting that always names a field: without a brace it is the name itself, `"body"` for `"{body}"`."""
    return ("", text, "") if "{" not in text else with_field(text)


def with_field(template: str) -> tuple[str, ...]:
    """`split_template`, and a ValueError where no field is named: every row would say the same."""
    parts = split_template(template)
    if len(parts) == 1:
        raise ValueError(f"{template!r} says the same for every row; expected the name of a field in braces, such as {{text}}")
    return parts

"""The chat template of a tokenizer of stock Transformers, rendered as Transformers does, but in a process with bounded time
and memory: `apply_chat_template` would render a stranger's template in this one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm.errors import InputError
from llm.tokenizer.render_process import render_apart


def rendered_by_stock(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A chat as text; `options` are those of `apply_chat_template`, and variables of the template. InputError if the template
    refuses the chat, or takes too much.
    """
    request = {"messages": [dict(message) for message in messages], "options": options}
    (found,) = render_apart([request], tokenizer.get_chat_template(), tokenizer.special_tokens_map, marked=False)
    if isinstance(found, InputError):
        raise found
    return found[0]


def with_bounded_template(tokenizer: Any) -> Any:
    """The tokenizer, for a library that calls its `apply_chat_template` for texts: a refusal is an error of Jinja, as
    there."""
    from jinja2 import TemplateError

    def apply(messages: Sequence[Mapping[str, Any]], *, tokenize: bool = False, **options: Any) -> str:
        if tokenize:
            raise ValueError("tokenize: expected False, since only the text is rendered here, got True")
        try:
            return rendered_by_stock(tokenizer, messages, **options)
        except InputError as error:
            raise TemplateError(str(error)) from error

    tokenizer.apply_chat_template = apply
    return tokenizer

"""The chat template: how turns of a chat become one text, and which of it is learned. Not tokens: `llm.tokenizer.tokenizer`.

    <|begin|><|user|>Q<|assistant|>A<|end|><|user|>Q2<|assistant|>A2<|end|>

The template is stored once, in the tokenizer's configuration, and rendered by Transformers itself, so that training sees
exactly what everybody who calls `apply_chat_template` gives the model. What stands between `{% generation %}` and
`{% endgeneration %}` is learned: the assistant's text and the end token after it. A template from elsewhere may lack these
marks; then what it adds to a chat where the assistant speaks is learned, up to the first special token after the text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm.errors import InputError

BEGIN, END, PADDING = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, PADDING, SYSTEM, USER, ASSISTANT)  # in the order of their ids, from 0

Chat = Sequence[Mapping[str, str]]  # messages: role and content
Span = tuple[int, int]  # of characters: first, and one after the last

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('a chat has the roles system, user and assistant, found ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# For a tokenizer from elsewhere that has no template and no tokens for roles: plain words, and its own begin and end.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{% set content = message['content'] | trim %}"
    "{% if message['role'] == 'system' %}{{ content + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + content + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:' }}"
    "{% generation %}{{ ' ' + content + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('a chat has the roles system, user and assistant, found ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# The day on which a template says today is: the one that Llama's own templates fall back on.
_DAY = {"Y": "2024", "m": "07", "d": "26", "b": "Jul", "B": "July", "a": "Fri", "A": "Friday", "H": "00", "M": "00", "S": "00"}


def with_fixed_day(template: str) -> str:
    """A template that asks for the date, changed to take the same one always: what was learned is what will be rendered."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('%{directive}', '{value}')" for directive, value in _DAY.items())
    return f"{{%- macro strftime_now(form) -%}}{{{{ form{replaced} }}}}{{%- endmacro -%}}{template}"


def render_chats(
    chats: Sequence[Chat], template: str, *, special_tokens: Mapping[str, str], add_generation_prompt: bool = False
) -> list[str]:
    """Each chat as text. `special_tokens` holds bos_token and the like. InputError if the template refuses a chat."""
    texts: list[str]
    texts, _ = _render(chats, template, special_tokens, add_generation_prompt=add_generation_prompt)
    return texts


def render_learned(
    chats: Sequence[Chat], template: str, *, special_tokens: Mapping[str, str], any_special: re.Pattern[str]
) -> list[tuple[str, list[Span]]]:
    """Each chat as text, and the spans of the text that are learned. `any_special` matches every special token.

    InputError if the template refuses a chat, or if what the assistant says cannot be told apart in what it renders.
    """
    if _MARK.search(template):
        return list(zip(*_render(chats, template, special_tokens, return_assistant_tokens_mask=True), strict=True))
    texts = render_chats(chats, template, special_tokens=special_tokens)
    answers = [(chat, number) for chat in chats for number, message in enumerate(chat) if message["role"] == "assistant"]
    before = iter(
        render_chats(
            [chat[:number] for chat, number in answers], template, special_tokens=special_tokens, add_generation_prompt=True
        )
    )
    return [(text, list(_spans(text, chat, before, any_special))) for text, chat in zip(texts, chats, strict=True)]


def _spans(text: str, chat: Chat, before: Iterator[str], any_special: re.Pattern[str]) -> Iterator[Span]:
    """Where the assistant speaks in `text`; `before` gives the text up to each of its turns."""
    for message in chat:
        if message["role"] != "assistant":
            continue
        start = len(prompt := next(before))
        content = message["content"].strip()  # most templates cut white space at the ends
        if not text.startswith(prompt):
            raise _unmarked("an earlier part of a chat changes with what follows")
        if (found := text.find(content, start)) < 0:
            raise _unmarked("the assistant's text is not written as it is")
        if (end := any_special.search(text, found + len(content))) is None:
            raise _unmarked("no end token follows the assistant's text")
        yield start, end.end()


def _unmarked(why: str) -> InputError:
    return InputError(
        f"the chat template does not mark what the assistant says, and it cannot be told apart: {why}; expected a template "
        "that puts the assistant's text and the end token after it between {% generation %} and {% endgeneration %}"
    )


def _render(chats: Sequence[Chat], template: str, special_tokens: Mapping[str, str], **options: bool) -> Any:
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils  # half a second, so only where it is used

    render: Any = chat_template_utils.render_jinja_template  # its annotations say that it returns one string
    try:
        return render(conversations=chats, chat_template=template, **options, **special_tokens)
    except (TemplateError, TypeError) as error:
        raise InputError(f"the chat template does not take this chat: {error}") from error


def learned_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens overlap a learned span; tokens and spans are both in the order of the text."""
    learned = [False] * len(offsets)
    remaining = iter(spans)
    span = next(remaining, None)
    for place, (first, last) in enumerate(offsets):
        while span is not None and first >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        learned[place] = last > span[0]
    return learned

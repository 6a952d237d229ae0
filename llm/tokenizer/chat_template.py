"""The chat template: how the turns of a chat become one text, and which tokens of it the loss counts.

    <|begin|><|user|>Q<|assistant|>A<|end|><|user|>Q2<|assistant|>A2<|end|>

The template is stored once, in the tokenizer's configuration, and rendered by Transformers, so that training sees exactly
what `apply_chat_template` gives at inference; one of others is rendered in a process that can be ended. The loss counts what
is between `{% generation %}` and `{% endgeneration %}`: the assistant's text and the end token after it. A template of another
model may lack these marks; the loss then counts what the template adds for each turn of the assistant, up to the first special
token after its text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm.errors import InputError
from llm.tokenizer.render_process import render_apart

BEGIN, END, PADDING = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, PADDING, SYSTEM, USER, ASSISTANT)  # in the order of their ids, from 0

Chat = Sequence[Mapping[str, Any]]  # messages: role and content, and what else a template reads
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

# For a tokenizer of another model that has no template and no tokens for roles: plain words, its own begin and end tokens.
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
# The date that templates see as today: the one that Llama's own templates use by default.
_DAY = {"Y": "2024", "m": "07", "d": "26", "b": "Jul", "B": "July", "a": "Fri", "A": "Friday", "H": "00", "M": "00", "S": "00"}


def with_fixed_day(template: str) -> str:
    """A template that asks for today's date, changed to a fixed date, so that training and inference render the same."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('%{directive}', '{value}')" for directive, value in _DAY.items())
    return f"{{%- macro strftime_now(form) -%}}{{{{ form{replaced} }}}}{{%- endmacro -%}}{template}"


def render_chats(
    chats: Sequence[Chat],
    template: str,
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Each chat as text. `special_tokens` maps names such as bos_token. InputError if the template refuses a chat."""
    given = {"tools": list(map(dict, tools))} if tools else {}
    return list(_render(chats, template, special_tokens, add_generation_prompt=add_generation_prompt, **given)[0])


def render_with_spans(
    chats: Sequence[Chat], template: str, *, special_tokens: Mapping[str, str], any_special: re.Pattern[str]
) -> list[tuple[str, list[Span]]]:
    """Each chat as text, and the spans of the text that the loss counts. `any_special` matches every special token.

    InputError if the template refuses a chat, or if the assistant's turns cannot be located in the rendered text.
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
    """The assistant's turns in `text`; `before` gives the text up to each of them."""
    for message in chat:
        if message["role"] != "assistant":
            continue
        start = len(prompt := next(before))
        content = message["content"].strip()  # most templates strip white space
        if not text.startswith(prompt):
            raise _unmarked("an earlier part of a chat changes with what follows")
        if (found := text.find(content, start)) < 0:
            raise _unmarked("the assistant's text is not rendered unchanged")
        if (end := any_special.search(text, found + len(content))) is None:
            raise _unmarked("no end token follows the assistant's text")
        yield start, end.end()


def _unmarked(why: str) -> InputError:
    return InputError(
        f"the chat template does not mark the assistant's turns, and they cannot be located: {why}; put the assistant's text "
        "and the end token after it between {% generation %} and {% endgeneration %}"
    )


def _render(chats: Sequence[Chat], template: str, special_tokens: Mapping[str, str], **options: Any) -> Any:
    if template not in (CHAT_TEMPLATE, PLAIN_TEMPLATE):
        return render_apart(chats, template, special_tokens, **options)
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils  # takes half a second to import

    render: Any = chat_template_utils.render_jinja_template  # annotated as returning one string
    try:
        return render(conversations=chats, chat_template=template, **options, **special_tokens)
    except (TemplateError, TypeError) as error:
        raise InputError(f"the chat template refuses this chat: {error}") from error


def loss_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens overlap one of the spans; tokens and spans are both in the order of the text."""
    mask = [False] * len(offsets)
    remaining = iter(spans)
    span = next(remaining, None)
    for place, (first, last) in enumerate(offsets):
        while span is not None and first >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        mask[place] = last > span[0]
    return mask

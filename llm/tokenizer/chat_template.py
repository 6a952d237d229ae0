"""The chat template: how the turns of a chat become one text, and which tokens of it the loss counts.

    <|begin|><|user|>Q<|assistant|>A<|end|><|user|>Q2<|assistant|>A2<|end|>

The template is stored once, in the tokenizer's configuration, and rendered by Transformers, so that training sees exactly
what `apply_chat_template` gives at inference; one of others is rendered in a process that can be ended. The loss counts what
is between `{% generation %}` and `{% endgeneration %}`: the assistant's text and the end token after it. In a template of
another model, which may lack these marks, `llm.tokenizer.answers` finds the answers.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from llm.errors import InputError
from llm.tokenizer.render_process import Rendered, render_apart, render_here

BEGIN, END, PADDING = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, PADDING, SYSTEM, USER, ASSISTANT)  # in the order of their ids, from 0

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


def is_marked(template: str) -> bool:
    """Whether the template marks what is learned by `{% generation %}`."""
    return _MARK.search(template) is not None


def render_chats(
    requests: Sequence[Mapping[str, Any]], template: str, special_tokens: Mapping[str, str], *, marked: bool = False
) -> list[Rendered | InputError]:
    """The texts of chats, as `llm.tokenizer.render_process` says; a template of others is rendered in its process."""
    render = render_here if template in (CHAT_TEMPLATE, PLAIN_TEMPLATE) else render_apart
    return render(requests, template, special_tokens, marked=marked)


def loss_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens overlap one of the spans; tokens and spans are both in the order of the text."""
    mask = [False] * len(offsets)
    for start, end in spans:
        begin = bisect_right(offsets, start, key=itemgetter(1))
        stop = bisect_left(offsets, end, lo=begin, key=itemgetter(0))
        mask[begin:stop] = [True] * (stop - begin)
    return mask

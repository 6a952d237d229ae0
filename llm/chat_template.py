"""The chat template: how turns of a chat become one text, and which of it is learned. Not tokens: `llm.tokenizer`.

    <|begin|><|user|>Q<|assistant|>A<|end|><|user|>Q2<|assistant|>A2<|end|>

The template is stored once, in the tokenizer's configuration, and rendered by Transformers itself, so that training sees
exactly what everybody who calls `apply_chat_template` gives the model. What stands between `{% generation %}` and
`{% endgeneration %}` is learned: the assistant's text and the end token after it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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


def render_chats(
    chats: Sequence[Sequence[Mapping[str, str]]],
    template: str,
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
) -> list[tuple[str, list[Span]]]:
    """Each chat as text, and the spans of the text that are learned. `special_tokens` holds bos_token and the like."""
    from transformers.utils import chat_template_utils  # half a second, so only where it is used

    render: Any = chat_template_utils.render_jinja_template  # its annotations say that it returns one string
    texts, spans = render(
        conversations=chats,
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **special_tokens,
    )
    return list(zip(texts, spans, strict=True))


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

"""A message as chats here have it, and as the chat template of a model wants it.

A message has `role` and `content`. Further fields are optional: `reasoning_content`, the text that the model writes before an
answer; `tool_calls`, as OpenAI has them, but with arguments as a value, not as text; of a tool's message `name` and
`tool_call_id`; `weight`, 0 for an answer that is not learned. The first message of a chat may have `tools`, the definitions of
functions that may be called.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm.errors import InputError
from llm.text.reasoning import split_reasoning
from llm.text.tool_calls import OPEN, split_calls
from llm.tokenizer.control_tokens import ControlTokens
from llm.tokenizer.template_abilities import Abilities, with_think_block

ChatMessage = Mapping[str, Any]
Chat = Sequence[ChatMessage]


@dataclass(frozen=True)
class PreparedMessage:
    """A message for the template, with stand-ins for what could begin a control token."""

    fields: dict[str, Any]
    reasoning: str | None = None  # with stand-ins, too
    is_learned: bool = True
    words: tuple[str, ...] = ()  # what has to be in the rendered answer


def prepare(message: ChatMessage, control: ControlTokens, abilities: Abilities) -> PreparedMessage:
    """The message as the template wants it; InputError for a field that the template does not write."""
    role, content = message["role"], message["content"] or ""
    reasoning = message.get("reasoning_content")
    if role == "assistant" and reasoning is None:
        reasoning, content = split_reasoning(content)
    calls = message.get("tool_calls")
    if role == "assistant" and not calls and OPEN in content and abilities.calls is not None:
        content, calls = split_calls(content)  # or what is one token in pretraining would be learned as text
    if control.is_risky(content):
        content = control.protected(content)
    fields: dict[str, Any] = {"role": role, "content": content}
    if role != "assistant":
        if role == "tool":
            if abilities.calls is None or not abilities.calls.writes_results:
                raise InputError("expected a chat template that writes the results of tools, got one that does not")
            fields |= {name: control.protected(message[name]) for name in ("name", "tool_call_id") if message.get(name)}
        return PreparedMessage(fields)
    words = [content.strip()]
    if calls:
        fields |= _calls(calls, control, abilities)
        fields["content"] = content or (abilities.calls.content if abilities.calls else "")
        words += [call["function"]["name"] for call in fields["tool_calls"]]
    if reasoning is not None:
        reasoning = control.protected(reasoning)
        words.append(reasoning.strip())
        if abilities.reasoning == "field":
            fields["reasoning_content"] = reasoning
        elif abilities.reasoning == "content":
            fields["content"] = with_think_block(reasoning, content)
    return PreparedMessage(fields, reasoning, message.get("weight", 1) != 0, tuple(words))


def prepare_tools(tools: Sequence[Any] | None, control: ControlTokens, abilities: Abilities) -> list[Any] | None:
    """The definitions of tools; InputError if the template does not write them."""
    if not tools:
        return None
    if not abilities.writes_tools:
        raise InputError("expected a chat template that tells the model of tools, got one that does not")
    found: list[Any] = control.protected(list(tools))
    return found


def _calls(calls: Sequence[Mapping[str, Any]], control: ControlTokens, abilities: Abilities) -> dict[str, Any]:
    form = abilities.calls
    if form is None:
        raise InputError("expected a chat template that writes calls of tools, got one that does not")
    found = []
    for number, call in enumerate(calls, start=1):
        arguments = control.protected(call["function"]["arguments"])
        if form.as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        name, key = control.protected(call["function"]["name"]), control.protected(call.get("id") or f"call{number:05}")
        found.append({"type": "function", "id": key, "function": {"name": name, "arguments": arguments}})
    return {"tool_calls": found}

"""Turns from lists of messages, in the forms that people have: OpenAI's `{role, content}` and ShareGPT's `{from, value}`.

Kept are reasoning, calls of tools and whether an answer is learned; what cannot be learned is refused by its name. This module
is imported while planning, so it imports nothing that is slow.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm.data.turn import Turn, encodable, json_type
from llm.errors import InputError

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatbot", "bot", "function_call"),
    "tool": ("tool", "function", "observation", "tool_response", "ipython"),
}
ROLE = {name: role for role, names in ROLES.items() for name in names}
REASONING = ("reasoning_content", "reasoning", "thinking")
LEARNED = ("weight", "train", "loss")  # 0 or false: not
MEDIA = ("images", "videos", "audios", "image", "video", "audio")  # of a row


def turns_of_messages(row: Mapping[str, Any], field: str) -> list[Turn]:
    """The chat in `field` of `row`, with the `system` text and the `tools` beside it."""
    turns = list(read_messages(row[field], field))
    if "assistant" not in (turn.role for turn in turns):
        raise InputError(f"expected at least one turn of the assistant in {field!r}, got none")
    return with_row(turns, row)


def with_row(turns: list[Turn], row: Mapping[str, Any]) -> list[Turn]:
    """The turns with what a row has for all of them: the `system` text, and the definitions of `tools`."""
    if media := next((name for name in MEDIA if row.get(name)), None):
        raise InputError(f"expected text alone, got {media!r}, which are not read")
    if isinstance(row.get("system"), str) and row["system"].strip() and turns[0].role != "system":
        turns = [Turn("system", ("", encodable(row["system"], "'system'"), "")), *turns]
    if tools := _tools(row.get("tools") or row.get("functions")):
        turns = [Turn(turns[0].role, turns[0].parts, {**turns[0].more, "tools": tools}), *turns[1:]]
    return turns


def read_messages(messages: object, field: str) -> Iterator[Turn]:
    """The turns of a list of messages, or of its JSON text; InputError names the place in `field`."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = _parsed(messages, field)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"expected a list of messages in {field!r}, got {json_type(messages)}")
    for number, message in enumerate(messages):
        yield turn_of_message(message, f"{field}[{number}]")


def turn_of_message(message: object, place: str) -> Turn:
    """The turn of one message."""
    if not isinstance(message, Mapping):
        raise InputError(f"{place}: expected a message with role and content, got {json_type(message)}")
    said = message.get("role", message.get("from"))
    role = ROLE.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise InputError(f"{place}.role: expected one of {', '.join(ROLES)}, got {said!r}")
    if role != "assistant":
        content = _content(message, place)
        more = {
            name: encodable(message[name], place) for name in ("name", "tool_call_id") if isinstance(message.get(name), str)
        }
        return Turn(role, ("", content, ""), more if role == "tool" else {})
    is_call = isinstance(said, str) and said.lower() == "function_call"  # of ShareGPT: its value is the call
    calls = _calls(message.get("value", message.get("content")) if is_call else _calls_of(message), f"{place}.tool_calls")
    content = "" if is_call else _content(message, place, may_lack=bool(calls))
    if not content.strip() and not calls:
        raise InputError(f"{place}.content: expected the assistant's text, got none")
    found: dict[str, Any] = {"tool_calls": calls} if calls else {}
    if reasoning := next((message[name] for name in REASONING if message.get(name)), None):
        if not isinstance(reasoning, str):
            raise InputError(f"{place}.reasoning_content: expected text, got {json_type(reasoning)}")
        found["reasoning_content"] = encodable(reasoning, place)
    if not _is_learned(message, place):
        found["weight"] = 0
    return Turn("assistant", (content,), found)


def _content(message: Mapping[str, Any], place: str, *, may_lack: bool = False) -> str:
    """The text of a message, also if it comes in parts."""
    content = message.get("content", message.get("value"))
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        texts = []
        for number, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else json_type(part)
                raise InputError(f"{place}.content[{number}]: expected a part of text, got {kind!r}, which is not read")
            texts.append(part["text"])
        content = "".join(texts)
    if not isinstance(content, str):
        raise InputError(f"{place}.content: expected text, got {json_type(content)}")
    return encodable(content, place)


def _calls_of(message: Mapping[str, Any]) -> object:
    return message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else None)


def _calls(calls: object, place: str) -> list[dict[str, Any]]:
    """Calls of tools in OpenAI's form, with arguments as an object."""
    if calls is None:
        return []
    if isinstance(calls, str):
        calls = _parsed(calls, place)
    found = []
    for number, call in enumerate(
        [calls] if isinstance(calls, Mapping) else calls if isinstance(calls, Sequence) else [calls]
    ):
        where = f"{place}[{number}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: expected a call with a name and arguments, got {json_type(call)}")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str) and arguments.strip():
            arguments = _parsed(arguments, f"{where}.arguments")
        if not isinstance(arguments or {}, Mapping):
            raise InputError(f"{where}.arguments: expected an object, got {json_type(arguments)}")
        made = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments or {})}}
        key = call.get("id")
        found.append(_whole({"id": key, **made} if isinstance(key, str) else made, where))
    return found


def _tools(tools: object) -> list[dict[str, Any]]:
    """Definitions of tools in OpenAI's form."""
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if not tools:
        return []
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"expected a list of definitions in 'tools', got {json_type(tools)}")
    return [
        _whole(dict(tool) if "function" in tool or "type" in tool else {"type": "function", "function": dict(tool)}, "tools")
        for tool in tools
    ]


def _is_learned(message: Mapping[str, Any], place: str) -> bool:
    for name in LEARNED:
        if (weight := message.get(name)) is not None:
            if weight not in (0, 1):
                raise InputError(f"{place}.{name}: expected 0 or 1, got {weight!r}")
            return bool(weight)
    return True


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: expected JSON, got {text[:80]!r}") from error


def _whole(value: dict[str, Any], place: str) -> dict[str, Any]:
    encodable(json.dumps(value, ensure_ascii=False), place)
    return value

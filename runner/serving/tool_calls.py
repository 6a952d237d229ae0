"""Calls of tools in the text of an answer.

Two forms are known, which most open models write: JSON objects with a name and arguments between `<tool_call>` and
`</tool_call>` (Hermes, Qwen, SmolLM), and an answer that is such an object, or a list of them, with `parameters` or
`arguments` (Llama 3, Mistral).
"""

import json
import re
import uuid
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm.tokenizer.tokenizer import TextTokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BLOCK = re.compile(rf"{OPEN}\s*(.*?)\s*(?:{CLOSE}|\Z)", re.DOTALL)
SEPARATORS = ";, \n\t"  # between the objects of Llama 3

PROBE = {
    "type": "function",
    "function": {"name": "probe", "description": "A probe.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def shown(self) -> dict[str, Any]:
        """As OpenAI has it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


def find_calls(text: str, names: Container[str]) -> tuple[str, list[Call]]:
    """The text before the calls, and the calls of tools with these names; all of the text and none where it has others."""
    if OPEN in text:
        before, blocks = text[: text.index(OPEN)], [match.group(1) for match in BLOCK.finditer(text)]
    else:
        before, blocks = "", [text.strip()]
    calls: list[Call] = []
    for block in blocks:
        found = _parsed(block, names)
        if not found:
            return text, []
        calls += found
    return before, calls


def _parsed(text: str, names: Container[str]) -> list[Call]:
    """The calls that a text consists of; empty where it has anything else."""
    decoder, calls, place = json.JSONDecoder(), list[Call](), 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict) or not isinstance(item.get("name"), str) or item["name"] not in names:
                return []
            arguments = item.get("arguments", item.get("parameters", {}))
            if not isinstance(arguments, dict):
                return []
            calls.append(Call(item["name"], arguments))
        while place < len(text) and text[place] in SEPARATORS:
            place += 1
    return calls


def tools_fault(tokenizer: "TextTokenizer", tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a model's chat template cannot be used with these tools; None if it can. Without tools, any are meant.

    It has to tell of them, and to write a call in a form that is known here: found by rendering one.
    """
    from llm.errors import InputError

    tools, asked = tools or [PROBE], [{"role": "user", "content": "?"}]
    name = tools[0]["function"]["name"]
    function = {"name": name, "arguments": {"probe": "value"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    if not tokenizer.writes_tools:
        return "expected a chat template that tells the model of tools, got one that does not"
    try:
        prompt = tokenizer.render(asked, add_generation_prompt=True, tools=tools)
        whole = tokenizer.render([*asked, call], tools=tools)
    except InputError as error:
        return str(error)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    said = whole[sum(1 for _ in same) :]
    for special in tokenizer.special_tokens:
        said = said.replace(special, "")
    _, calls = find_calls(said.strip(), [name])
    if [call.arguments for call in calls] != [function["arguments"]]:
        return f"expected a chat template that writes calls as JSON, alone or in {OPEN}, got {said.strip()[:200]!r}"
    return None


class CallFilter:
    """Lets the text of an answer through piece by piece, and holds back what may be a call."""

    def __init__(self, names: Container[str]) -> None:
        self._names = names
        self._held, self._said = "", False  # text that waits; whether any was let through

    def passed(self, piece: str) -> str:
        """What of the text so far can be no part of a call."""
        self._held += piece
        text = self._held.lstrip()
        if not text or (not self._said and text[0] in "{["):
            return ""
        place = self._held.find(OPEN)
        if place < 0:
            begun = max((size for size in range(1, len(OPEN)) if self._held.endswith(OPEN[:size])), default=0)
            place = len(self._held) - begun
        ready, self._held = self._held[:place], self._held[place:]
        self._said = self._said or bool(ready.strip())
        return ready

    def rest(self) -> tuple[str, list[Call]]:
        """At the end of the answer: the text that was held back and is no call, and the calls."""
        return find_calls(self._held, self._names)

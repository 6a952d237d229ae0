"""What a chat template writes of tools, tool calls and reasoning, and in which form it wants them: found by rendering probes.

A template says nothing of itself, and one that does not know a field drops it without a word. So each probe holds words that
must be in the text that comes out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

from llm.errors import InputError

Render = Callable[[Sequence[Mapping[str, Any]]], Sequence[str | InputError]]  # requests to texts

_USER = {"role": "user", "content": "Question?"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "Probe."}}},
    },
}


@dataclass(frozen=True)
class CallForm:
    """How a template wants a message that calls tools."""

    as_text: bool  # arguments as JSON text, not as an object
    content: str | None  # where the message has no text
    writes_results: bool  # of tools


@dataclass(frozen=True)
class Abilities:
    """The abilities of the template that `render` renders."""

    render: Render

    @cached_property
    def reasoning(self) -> Literal["field", "content", "dropped"]:
        """Where the last answer's reasoning is written from: `reasoning_content`, a think block in the content, or nowhere."""
        options = {"enable_thinking": True}
        field = {"role": "assistant", "content": "Answer.", "reasoning_content": "probe_reasoning"}
        block = {"role": "assistant", "content": with_think_block("probe_reasoning", "Answer.")}
        texts = self.render([{"messages": [_USER, answer], "options": options} for answer in (field, block)])
        for form, text in zip(("field", "content"), texts, strict=True):
            if isinstance(text, str) and "probe_reasoning" in text and "Answer." in text:
                return form  # type: ignore[return-value]  # one of the literals above
        return "dropped"

    @cached_property
    def calls(self) -> CallForm | None:
        """The form of tool calls; None if the template does not write them."""
        forms = list(product((False, True), ("", None)))
        requests = []
        for as_text, content in forms:
            arguments = '{"probe_key": "probe_value"}' if as_text else {"probe_key": "probe_value"}
            call = {"type": "function", "id": "call00001", "function": {"name": "probe_call", "arguments": arguments}}
            result = {"role": "tool", "name": "probe_call", "tool_call_id": "call00001", "content": "probe_result"}
            calling = {"role": "assistant", "content": content, "tool_calls": [call]}
            messages = [_USER, calling, result, {"role": "assistant", "content": "Answer."}]
            requests += [{"messages": messages, "tools": [_TOOL]}, {"messages": messages[:2], "tools": [_TOOL]}]
        texts = self.render(requests)
        for number, (as_text, content) in enumerate(forms):
            whole, calling_alone = texts[2 * number : 2 * number + 2]
            if isinstance(calling_alone, str) and _is_whole_call(calling_alone):
                return CallForm(as_text, content, isinstance(whole, str) and "probe_result" in whole)
        return None

    @cached_property
    def writes_tools(self) -> bool:
        """Whether it writes the definitions of tools."""
        (text,) = self.render([{"messages": [_USER], "tools": [_TOOL]}])
        return isinstance(text, str) and "probe_tool" in text


def with_think_block(reasoning: str, text: str) -> str:
    """An answer's text after its reasoning, as most models write it."""
    return f"<think>\n{reasoning}\n</think>" + (f"\n\n{text}" if text else "")


def _is_whole_call(text: str) -> bool:
    """Whether the call is there with its arguments, neither twice escaped nor in Python's notation."""
    return (
        "probe_call" in text
        and "probe_value" in text
        and not any(wrong in text for wrong in ('\\"probe_key', "'probe_key'", '""probe'))
    )

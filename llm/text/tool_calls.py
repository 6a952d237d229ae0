"""The calls of tools that an answer has in its text, as most models write them and many data sets keep them.

This module is imported while planning, so it imports nothing that is slow.
"""

import json
import re
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_BLOCKS = re.compile(rf"(?:{OPEN}\s*\{{.*?\}}\s*{CLOSE}\s*)+", re.DOTALL)
_BLOCK = re.compile(rf"{OPEN}(.*?){CLOSE}", re.DOTALL)


def split_calls(content: str) -> tuple[str, list[dict[str, Any]]]:
    """The text of an answer before its calls, and the calls, as OpenAI has them but with arguments as a value.

    All of the text and no call, unless all that follows the first tag is calls: objects with a name and arguments.
    """
    start = content.find(OPEN)
    if start < 0 or not _BLOCKS.fullmatch(content, start):
        return content, []
    calls = []
    for block in _BLOCK.findall(content[start:]):
        try:
            call = json.loads(block)
        except (ValueError, RecursionError):
            return content, []
        if set(call) != {"name", "arguments"} or not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            return content, []
        calls.append({"type": "function", "function": call})
    return content[:start].rstrip(), calls

"""The reasoning that a model writes before an answer.

This module is imported while planning, so it imports nothing that is slow.
"""

import re

# A block, or what a model writes after a prompt that opens one.
_REASONED = re.compile(r"\s*(?:<think>(.*?)</think>|((?:(?!<think>).)*?)\n</think>\n)\s*", re.DOTALL)


def split_reasoning(content: str) -> tuple[str | None, str]:
    """The reasoning at the beginning of an answer, which a model writes before `</think>`, and the rest; None without any."""
    if "</think>" not in content or (found := _REASONED.match(content)) is None:
        return None, content
    return (found[1] or found[2] or "").strip() or None, content[found.end() :]

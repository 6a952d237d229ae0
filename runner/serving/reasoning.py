"""Reasoning in the text of an answer: what a model writes in a think block before it answers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm.tokenizer.tokenizer import TextTokenizer

OPEN, CLOSE = "<think>", "</think>"


def thinking_fault(tokenizer: "TextTokenizer", thinking: bool | None) -> str | None:
    """Why a model's chat template cannot be told to think or not; None if it can, or is not told."""
    if thinking is None or tokenizer.has_thinking_switch:
        return None
    return f"expected nothing, because the model's chat template does not read enable_thinking, got {thinking}"


def begins_in_block(tokenizer: "TextTokenizer", thinking: bool | None) -> bool:
    """Whether the prompt opens the think block, so that an answer begins inside it (R1, Qwen3.5)."""
    prompt = tokenizer.render([{"role": "user", "content": "?"}], thinking=thinking, add_generation_prompt=True)
    return prompt.rstrip().endswith(OPEN)


class ReasoningFilter:
    """Divides the text of an answer, piece by piece, into its reasoning and what is said after it."""

    def __init__(self, *, begins_in_block: bool) -> None:
        self._state = "reasoning" if begins_in_block else "start"
        self._held, self._thought = "", False  # text that waits; whether any reasoning was let through
        self.before = 0  # characters of the text before what is said

    def passed(self, piece: str) -> tuple[str, str]:
        """What is ready: reasoning without its tags and the space around it, and what is said."""
        self._held += piece
        reasoning = ""
        if self._state == "start" and not OPEN.startswith(self._held.lstrip()[: len(OPEN)]):
            self._state = "said"  # from its first character
        if self._state == "start" and OPEN in self._held:
            self._drop(self._held.index(OPEN) + len(OPEN))
            self._state = "reasoning"
        if self._state == "reasoning":
            reasoning = self._reasoning()
        if self._state == "after" and self._held.strip():
            self._drop(len(self._held) - len(self._held.lstrip()))
            self._state = "said"
        if self._state != "said":
            return reasoning, ""
        said, self._held = self._held, ""
        return reasoning, said

    def rest(self) -> tuple[str, str]:
        """At the end of the answer: what was held back."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return held.rstrip() if self._thought else held.strip(), ""
        return "", held if self._state == "start" else ""

    def _reasoning(self) -> str:
        """The reasoning that is ready: all but space and what may begin the closing tag."""
        if not self._thought:
            self._drop(len(self._held) - len(self._held.lstrip()))
        place = self._held.find(CLOSE)
        ready = self._held if place < 0 else self._held[:place]
        if place < 0:
            begun = max((size for size in range(1, len(CLOSE)) if ready.endswith(CLOSE[:size])), default=0)
            ready = ready[: len(ready) - begun]
        ready = ready.rstrip()
        self._thought = self._thought or bool(ready)
        self._drop(len(ready) if place < 0 else place + len(CLOSE))
        if place >= 0:
            self._state = "after"
        return ready

    def _drop(self, size: int) -> None:
        """Take so many characters from what waits."""
        self.before += size
        self._held = self._held[size:]

"""How long a model reads and writes."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class GenerationTimer:
    """Tokens and seconds of reading prompts and of decoding answers, end tokens included; filled in during generation."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def add(self, parts: Sequence["GenerationTimer"]) -> None:
        """Add what processes did at the same time: the tokens of all, and the time of the slowest."""
        self.prompt_tokens += sum(part.prompt_tokens for part in parts)
        self.new_tokens += sum(part.new_tokens for part in parts)
        self.prompt_seconds += max(part.prompt_seconds for part in parts)
        self.new_seconds += max(part.new_seconds for part in parts)

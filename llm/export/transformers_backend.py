"""A model folder in unmodified Transformers, or in PEFT with an adapter, as a backend of `llm.export.parity`."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.adapters.lora import check_config
from llm.tokenizer.stock_template import rendered_by_stock
from llm.tokenizer.tokenizer import ChatMessage

BATCH = 16  # prompts answered at once


class TransformersBackend:
    """A model from `from_pretrained` in fp32, with `adapter` on it by PEFT if given."""

    def __init__(
        self, folder: Path, *, ends: Sequence[int], padding: int, adapter: Path | None = None, device: str = "cpu"
    ) -> None:
        """`ends` are the tokens that end an answer; `padding` pads shorter prompts and is masked."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = "Transformers" if adapter is None else "PEFT"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        if adapter is not None:
            from peft import PeftModel

            check_config(adapter)
            model = PeftModel.from_pretrained(model, str(adapter))
        self._model = model.to(device).eval()
        self._ends, self._padding, self._device = frozenset(ends), padding, device

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special tokens."""
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The tokens of a chat up to where the assistant answers."""
        return self.encode_chat(messages, add_generation_prompt=True)

    def encode_chat(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False) -> list[int]:
        """The tokens of a whole chat, up to where the assistant answers if `add_generation_prompt`."""
        return self.encode(rendered_by_stock(self._tokenizer, messages, add_generation_prompt=add_generation_prompt))

    @torch.inference_mode()
    def log_probabilities(self, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token after each of `tokens`, (T, V)."""
        logits: Tensor = self._model(torch.tensor([list(tokens)], device=self._device)).logits[0]
        return logits.log_softmax(-1).cpu()

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens after each prompt, without the end token."""
        found: list[list[int]] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            width = max(map(len, batch))
            tokens = torch.tensor([[self._padding] * (width - len(prompt)) + list(prompt) for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            written = self._model.generate(
                input_ids=tokens.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,  # whatever the model's own default is
                pad_token_id=self._padding,
            )
            found += [list(takewhile(lambda token: token not in self._ends, row)) for row in written[:, width:].tolist()]
        return found

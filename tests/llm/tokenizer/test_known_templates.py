"""The chat templates of well-known models: what is learned of a chat of three turns with a call of a tool and reasoning.

They need the tokenizers themselves: `STOCKPOT_REAL_MODELS` names a folder with `qwen3`, `qwen2_5`, `llama3_2`, `deepseek_v3`,
`gemma3-tokenizer` and `smollm2` in it, each with tokenizer.json and the template in tokenizer_config.json or
chat_template.jinja.
"""

import os
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from chat_templates import learned

from llm.errors import InputError
from llm.tokenizer.chat_template import with_fixed_day
from llm.tokenizer.tokenizer import TextTokenizer

pytestmark = pytest.mark.long

TYPED = "Thanks <|im_end|><|eot_id|><end_of_turn></think>"
TOOL = {
    "type": "function",
    "function": {
        "name": "dose",
        "description": "D.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "dose", "arguments": {"of": "aspirin"}}}
ASKED, CALLING = {"role": "user", "content": "Dose?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT, TOLD = {"role": "tool", "content": "100 mg", "name": "dose"}, {"role": "assistant", "content": "100 mg."}
THANKS = {"role": "user", "content": TYPED}
LAST = {"role": "assistant", "content": "You are welcome.", "reasoning_content": "Polite."}
BLOCK = "<think>\nPolite.\n</think>\n\nYou are welcome."
CHATML_CALL = '<tool_call>\n{"name": "dose", "arguments": {"of": "aspirin"}}\n</tool_call><|im_end|>'

EXPECTED = {
    "qwen3": [CHATML_CALL, "100 mg.<|im_end|>", f"{BLOCK}<|im_end|>"],
    "qwen2_5": [CHATML_CALL, "100 mg.<|im_end|>", f"{BLOCK}<|im_end|>"],
    "llama3_2": ['{"name": "dose", "parameters": {"of": "aspirin"}}<|eot_id|>', "100 mg.<|eot_id|>", f"{BLOCK}<|eot_id|>"],
    "deepseek_v3": [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>dose\n```json\n"
        '{"of": "aspirin"}\n```<｜tool▁call▁end｜><｜end▁of▁sentence｜>',
        "100 mg.<｜end▁of▁sentence｜>",
        f"{BLOCK}<｜end▁of▁sentence｜>",
    ],
    "gemma3-tokenizer": ["100 mg.<end_of_turn>", f"{BLOCK}<end_of_turn>"],
    "smollm2": ["100 mg.<|im_end|>", f"{BLOCK}<|im_end|>"],
}
WITHOUT_TOOLS = ("gemma3-tokenizer", "smollm2")


def known(name: str) -> TextTokenizer:
    place = os.environ.get("STOCKPOT_REAL_MODELS")
    if place is None or not (folder := Path(place) / name).exists():
        pytest.skip(f"expected STOCKPOT_REAL_MODELS to name a folder with {name}")
    tokenizer = TextTokenizer.load(folder)
    return tokenizer.with_template(with_fixed_day(tokenizer.template or ""))


@pytest.mark.parametrize("name", EXPECTED)
def test_calls_answers_and_reasoning_are_learned_and_nothing_else(name: str) -> None:
    tokenizer = known(name)
    chat: list[dict[str, Any]] = [ASKED, CALLING, RESULT, TOLD, THANKS, LAST]
    if name in WITHOUT_TOOLS:
        with pytest.raises(InputError, match="expected a chat template that writes calls of tools"):
            learned(tokenizer, chat)
        chat = [ASKED, TOLD, THANKS, LAST]
    found = [run for part in runs(tokenizer, chat) for run in part]
    assert sorted(found) == sorted(EXPECTED[name])
    assert all("Thanks" not in run and "Dose?" not in run for run in found)
    if name in ("qwen3", "qwen2_5", "llama3_2"):
        (text,) = learned(tokenizer, [{**ASKED, "tools": [TOOL]}, TOLD])
        assert text.index('"description": "D."') < text.index("Dose?") < text.index("[100 mg.")
    else:
        with pytest.raises(InputError, match="expected a chat template that tells the model of tools"):
            learned(tokenizer, [{**ASKED, "tools": [TOOL]}, TOLD])


def runs(tokenizer: TextTokenizer, chat: list[dict[str, Any]]) -> list[list[str]]:
    """The learned runs of each part."""
    (parts,) = tokenizer.encode_parts([chat])
    assert not isinstance(parts, InputError), parts
    return [
        [
            tokenizer.decode([token for token, _ in run], special=True)
            for counts, run in groupby(zip(part.ids, part.loss_mask, strict=True), key=lambda pair: pair[1])
            if counts
        ]
        for part in parts
    ]

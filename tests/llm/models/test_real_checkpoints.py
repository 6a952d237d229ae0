"""Checkpoints that others published compute here what they compute in stock Transformers, on real text.

STOCKPOT_REAL_MODELS names a folder of model folders (`config.json`, safetensors, `tokenizer.json`), such as one with
SmolLM2-135M-Instruct and Gemma-3-270m; each is tested. It takes some seconds and 2 GB of memory for each.
"""

import gc
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm.inference.generate import generate
from llm.models.checkpoint import load_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer

FOLDER = os.environ.get("STOCKPOT_REAL_MODELS")
MODELS = sorted(path.parent for path in Path(FOLDER).glob("*/model.safetensors")) if FOLDER else []
pytestmark = [pytest.mark.long, pytest.mark.skipif(not MODELS, reason="STOCKPOT_REAL_MODELS names no folder of models")]
REPOSITORY = Path(__file__).parents[3]
LENGTH, COMPARED = 900, 64  # above the windows of the models; positions whose logits are compared


def real_text(tokenizer: TextTokenizer) -> list[int]:
    pages = [(REPOSITORY / "recipes" / name).read_text(encoding="utf-8") for name in ("README.zh.md", "guide.md")]
    return [*tokenizer.encode_document(pages[0])[: LENGTH // 2], *tokenizer.encode_document(pages[1])[: LENGTH // 2]]


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_logits_and_greedy_text_of_a_published_checkpoint_are_those_of_transformers(folder: Path) -> None:
    tokenizer = TextTokenizer.load(folder)
    tokens = real_text(tokenizer)
    prompts = [tokens[:12], tokens[-700:]]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        wanted = stock(torch.tensor([tokens]), logits_to_keep=COMPARED).logits[0]
        texts = [stock.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    del stock
    gc.collect()
    model = load_checkpoint(folder)
    with torch.inference_mode():
        found = model.lm_head(model.hidden(torch.tensor([tokens]))[0, -COMPARED:])
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    ends = model_ends(folder, tokenizer)
    ours = [generate(model, [prompt], max_new_tokens=12, end=ends)[0] for prompt in prompts]
    assert ours == [[token for token in text if token not in ends] for text in texts]


def model_ends(folder: Path, tokenizer: TextTokenizer) -> tuple[int, ...]:
    from transformers import GenerationConfig

    end = GenerationConfig.from_pretrained(folder).eos_token_id
    return tuple(end if isinstance(end, list) else [tokenizer.end if end is None else end])

"""A tiny model with Chinese and English text to release, and its GGUF file in llama.cpp."""

from pathlib import Path
from typing import Any

import torch

from llm.export.llama_cpp_backend import LlamaCppBackend
from llm.models import architectures
from llm.models.checkpoint import read_config, save_checkpoint
from llm.tokenizer.pretokenizers import PreTokenizerName
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe

TEXTS = [
    "The heart pumps blood through the body. What does the heart do? It pumps blood. I'm sure it'll do.",
    "The lungs breathe air, day and night: 1592 times, 31 times. What do the lungs do? They breathe air.",
    "发烧和头痛是常见症状。多喝水，多休息。发烧38.5度怎么办？多喝水。",
    "one two three\n\n 3, 14 and 1592.  Two  spaces.",
]
PROMPTS = [
    [{"role": "user", "content": "What does the heart do?"}],
    [{"role": "user", "content": "发烧怎么办？"}],
    [
        {"role": "user", "content": "The lungs?"},
        {"role": "assistant", "content": "多休息。"},
        {"role": "user", "content": "one two  three\n1592"},
    ],
]


def tiny_checkpoint(
    folder: Path, *, architecture: str = "llama", pre_tokenizer: PreTokenizerName = "smollm", **sizes: Any
) -> Path:
    """A model with random weights, large enough that its choices have no near ties."""
    tokenizer = train_bpe(TEXTS * 2, 340, min_frequency=2, pre_tokenizer_name=pre_tokenizer, allow_smaller=True)
    tokenizer.save(folder)
    kind = architectures()[architecture]
    config = kind.config({"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 128} | sizes)
    torch.manual_seed(0)
    model = kind.build(config, vocab_size=tokenizer.vocab_size)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.15)
    save_checkpoint(folder, model, folder)
    return folder


def open_in_llama_cpp(gguf: Path, checkpoint: Path, *, context: int | None = None) -> LlamaCppBackend:
    """The file in llama.cpp; `checkpoint` is the folder that it was written from, `context` the longest text, if not its
    own."""
    config, vocab_size = read_config(checkpoint / "config.json")
    ends = TextTokenizer.load(checkpoint).ends
    return LlamaCppBackend(gguf, name="llama.cpp", context=context or config.context or 0, vocab_size=vocab_size, ends=ends)

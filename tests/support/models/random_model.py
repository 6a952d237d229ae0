"""A small model with random weights and a tokenizer of its own, as a checkpoint."""

from pathlib import Path
from typing import Any

import torch

from llm.models.checkpoint import save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.train_bpe import train_bpe


def random_model(
    folder: Path, texts: list[str], vocab_size: int = 300, *, seed: int = 0, std: float | None = None, **sizes: Any
) -> Path:
    """The folder, with a tokenizer that learned `texts`; matrices have the deviation `std`, if it is given."""
    tokenizer = train_bpe(texts, vocab_size, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)
    tokenizer.save(folder)
    torch.manual_seed(seed)
    config = DecoderConfig.model_validate({"hidden_size": 16, "layers": 1, "heads": 2, "context": 64} | sizes)
    model = Decoder(config, vocab_size=tokenizer.vocab_size)
    if std is not None:
        for weight in model.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=std)
    save_checkpoint(folder, model, folder)
    return folder

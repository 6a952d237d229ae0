"""A small model, and logits of rows: as its decoding form gives them step by step, and as one forward pass does."""

import torch
from torch import Tensor

from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.models.interface import Decoding

VOCABULARY = 61
LENGTHS = [7, 1, 12, 3]


def small(**changes: object) -> Decoder:
    torch.manual_seed(5)
    config = DecoderConfig(**{"hidden_size": 32, "layers": 2, "heads": 4, "context": 32} | changes)
    model = Decoder(config, vocab_size=VOCABULARY).eval()
    for name, weight in model.named_parameters():  # norms that are not one, and logits that are not all alike
        weight.data = 1 + 0.3 * torch.randn_like(weight) if "norm" in name else 1.5 * weight.data
    return model


def texts(lengths: list[int], *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def decoded(decoding: Decoding, rows: list[list[int]], *, read: list[int]) -> list[Tensor]:
    """Logits of each row (T, V): after the first `read` tokens, and after each of the rest, given one by one."""
    count = len(rows[0]) - read[0]
    logits = [decoding.read([row[:size] for row, size in zip(rows, read, strict=True)], room=count)]
    for step in range(count):
        logits.append(decoding.step([row[size + step] for row, size in zip(rows, read, strict=True)]))
    return list(torch.stack(logits, 1))


@torch.inference_mode()
def computed(model: Decoder, rows: list[list[int]], *, read: list[int]) -> list[Tensor]:
    return [model(torch.tensor([row]))[0, size - 1 :].float() for row, size in zip(rows, read, strict=True)]


def rows_of(lengths: list[int], *, more: int = 8) -> list[list[int]]:
    return texts([length + more for length in lengths])

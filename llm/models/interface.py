"""What the rest of Stockpot may ask of an architecture: its configuration, the model, and the model's decoding form.

Training, adapters, inference, evaluation, export and benchmarks know a model by these types alone; none of them imports an
architecture by name. `llm.models.architectures` builds models, `llm.models.checkpoint` opens them.

Letters: B rows, T positions, D hidden size, V vocabulary.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from llm.device import Precision


class ModelConfig(Protocol):
    """The configuration of a model: a frozen Pydantic model, which is also the table `architecture` of a recipe."""

    @property
    def name(self) -> str:
        """The architecture: a family of `llm.models.families`."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def layers(self) -> int:
        """Decoder layers."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""

    @property
    def head_size(self) -> int:
        """Width of a head."""

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""

    @property
    def context(self) -> int | None:
        """Longest sequence; None where a recipe leaves it to the tokens; a built model has `context`."""

    @property
    def resolved_context(self) -> int:
        """Longest sequence; ValueError where it is still open."""

    def with_context(self, context: int) -> Self:
        """This configuration, with `context` where it leaves that open."""


class LanguageModel(nn.Module, ABC):
    """A decoder with an output head, whose modules and weights have the names of Transformers' model of its type."""

    lm_head: nn.Linear  # hidden states (..., D) to logits (..., V); its weight may be that of the embedding

    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.context = config.resolved_context  # longest sequence
        self.recompute = False  # compute layers again in the backward pass: less memory, a third more work
        self.compiled = False  # whether training runs the layers as torch.compile makes them
        self.exact_in_llama_cpp = True  # whether llama.cpp computes all of it in fp32, from weights in fp32
        self.fused_attention = False  # whether attention is that of `llm.layers.fused_attention`, where it fits

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The input embedding, `model.embed_tokens` by name."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The decoder layers, `model.layers` by name."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @abstractmethod
    def forward(self, tokens: Tensor, *, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T); the arguments are those of `hidden`."""

    @abstractmethod
    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """The final hidden states (B, T, D), which `lm_head` reads: a loss computes logits in chunks of them.

        `documents` (B, T) numbers the document of each position (attention stays inside); `positions` (B, T) counts from the
        start of each document. Without them a row is one document.
        """

    @abstractmethod
    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of a forward and backward pass per position in rows of `context`, those of adapters
        included: an estimate.
        """

    def decoding(self) -> "Decoding":
        """The model arranged for decoding, with its present weights."""
        module: Any = importlib.import_module("llm.models.decoder.decode")  # which imports the model
        made: Decoding = module.build(self)
        return made


class Decoding(Protocol):
    """A model that reads a batch of prompts, then decodes one token per row and step, behind a cache of keys and values.

    Reading another batch ends the one before. Call under `torch.inference_mode`, on a model that does not change meanwhile.
    """

    @property
    def context(self) -> int:
        """Longest sequence: prompt and new tokens."""

    @property
    def bytes_per_position(self) -> int:
        """Bytes of the cache for one position of one row."""

    @property
    def vocab_size(self) -> int:
        """Numbers in the logits of one position."""

    @property
    def device(self) -> torch.device:
        """Where the cache is."""

    def compile(self) -> None:
        """Compile the step of a batch of one row, where that is faster; InputError without a C++ compiler."""

    def read(self, prompts: Sequence[Sequence[int]], *, room: int) -> Tensor:
        """Begin a batch with `prompts`; logits (B, V) after the last token of each, in fp32. Then `room` tokens fit."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token per row, in fp32."""

    def look_ahead(self, tokens: Tensor, targets: Tensor, branches: Tensor) -> Tensor:
        """log P (B, T), in fp64, of each of `targets` after the one of `tokens` beside it; they do not stay in the cache.

        Positions with the same number in `branches` follow each other: they continue what their row has read, and see no other
        branch. All three are (B, T), of at most the `room` that was asked for.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row of the batch but these."""

    def release(self) -> None:
        """End the batch and give back the memory of its cache."""


def as_decoding(model: LanguageModel | Decoding) -> Decoding:
    """The decoding form of `model`; itself if it is one."""
    return model.decoding() if isinstance(model, LanguageModel) else model


def precision_of(model: LanguageModel) -> Precision:
    """The precision of the products of a model whose weights are all of one dtype: that of its head."""
    return "bf16" if model.lm_head.weight.dtype == torch.bfloat16 else "fp32"


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of weights whose products have this precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters learn, and how many there are."""
    learned = sum(element_count(weight) for weight in model.parameters() if weight.requires_grad)
    return learned, sum(element_count(weight) for weight in model.parameters())


def element_count(weight: Tensor) -> int:
    """How many numbers `weight` stands for; in four bits, it stores two in a byte."""
    packed = getattr(weight, "quant_state", None)  # where bitsandbytes keeps the shape of a weight in four bits
    return weight.numel() if packed is None else math.prod(packed.shape)

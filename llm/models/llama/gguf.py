"""A LLaMA as llama.cpp's architecture "llama": names of its sizes and weights, and its order of rotary channels.

Transformers rotates channel i of a head with channel i + E / 2, llama.cpp's "llama" channel 2i with 2i + 1: the rows of q and
k are put in that order. Letters: E head size, D hidden size.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm.models.llama.config import LinearScaling, Llama3Scaling, LlamaConfig
from llm.models.llama.model import rope_frequencies

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "llama"


def write_sizes(writer: "GGUFWriter", config: LlamaConfig) -> None:
    """Write the fields from which llama.cpp builds the model."""
    from gguf import RopeScalingType

    writer.add_context_length(config.resolved_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if isinstance(config.rope_scaling, LinearScaling):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def tensors(config: LlamaConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every weight under llama.cpp's name; without a tied head, as llama.cpp has it."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.layers)
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(stem.rpartition(".")[2])
        found = names.get_name(stem)
        assert found is not None, name  # the weights are those of the architecture
        yield f"{found}.weight", weight if heads is None else interleaved(weight, heads)
    if isinstance(config.rope_scaling, Llama3Scaling):  # the divisors of the frequencies
        cpu = torch.device("cpu")
        plain = rope_frequencies(config.model_copy(update={"rope_scaling": None}), device=cpu)
        yield "rope_freqs.weight", plain / rope_frequencies(config, device=cpu)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """`weight` (heads * E, D) with the rows of each head in the order 0, E / 2, 1, E / 2 + 1, ..."""
    pairs = weight.view(heads, 2, -1, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)

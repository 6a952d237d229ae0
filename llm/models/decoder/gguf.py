"""A decoder as llama.cpp computes it: names of its architecture, sizes and weights, and its order of rotary channels.

Transformers rotates channel i of a head with channel i + E / 2; some of llama.cpp's architectures channel 2i with 2i + 1: the
rows of q and k are put in that order. Letters: E head size, D hidden size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from llm.errors import InputError
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.rope import attention_factor, rope_frequencies
from llm.models.families import families
from llm.models.options import LinearScaling, Llama3Scaling, LongRope, YarnScaling

if TYPE_CHECKING:
    from gguf import GGUFWriter

T = TypeVar("T")


def architecture_of(config: DecoderConfig) -> str:
    """llama.cpp's name of the architecture."""
    return families()[config.name].gguf_architecture


def write_sizes(writer: "GGUFWriter", config: DecoderConfig) -> None:
    """Write the fields from which llama.cpp builds the model. InputError names an option that llama.cpp does not compute."""
    _check(config)
    writer.add_context_length(config.resolved_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.rotated_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    _write_scaling(writer, config)
    families()[config.name].write_gguf(writer, config)


def _check(config: DecoderConfig) -> None:
    family = families()[config.name]
    own, parts = config.model_copy(update={"options": None}).parts, config.parts
    cure = ""
    if own.window is None and parts.window is not None:  # llama.cpp has none there
        if parts.window >= config.resolved_context:  # and this one hides nothing
            parts = parts.model_copy(update={"window": None, "pattern": ("full",)})
        cure = f": a window of at least the context, {config.resolved_context}, is the same as none; here it is {parts.window}"
    for name, value in parts:
        if name not in family.gguf_options and value != (known := getattr(own, name)):
            raise InputError(
                f"{name}: expected {known!r}, as llama.cpp has it in every {config.name}, got {value!r}"
                + (cure if name == "pattern" else "")
            )
    if isinstance(config.rope_scaling, YarnScaling) and not config.rope_scaling.truncate:
        raise InputError("rope_scaling.truncate: expected true, as llama.cpp has it, got false")


def _write_scaling(writer: "GGUFWriter", config: DecoderConfig) -> None:
    from gguf import RopeScalingType

    match config.rope_scaling:
        case LinearScaling(factor=factor):
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(factor)
        case YarnScaling() as scaling:
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(scaling.factor)
            writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
            writer.add_rope_scaling_yarn_beta_fast(scaling.fast)
            writer.add_rope_scaling_yarn_beta_slow(scaling.slow)
            # llama.cpp multiplies by its own factor of the scaling as well.
            writer.add_rope_scaling_attn_factors(attention_factor(config) / (0.1 * math.log(scaling.factor) + 1.0))
        case LongRope() as scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
            writer.add_rope_scaling_attn_factors(attention_factor(config))


def tensors(config: DecoderConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every weight under llama.cpp's name; without a tied head, where llama.cpp takes the embedding."""
    family = families()[config.name]
    for name, (found, heads, offset) in _places(config, weights).items():
        weight = weights[name]
        yield found, (interleaved(weight, heads) if heads else weight) + offset if heads or offset else weight
    if config.tied and not family.gguf_ties:
        yield "output.weight", weights["model.embed_tokens.weight"]
    cpu = torch.device("cpu")
    if isinstance(config.rope_scaling, Llama3Scaling):  # the divisors of the frequencies
        plain = rope_frequencies(config.model_copy(update={"rope_scaling": None}), device=cpu)
        yield "rope_freqs.weight", plain / rope_frequencies(config, device=cpu)
    if isinstance(config.rope_scaling, LongRope):
        yield "rope_factors_long.weight", torch.tensor(config.rope_scaling.long_divisors)
        yield "rope_factors_short.weight", torch.tensor(config.rope_scaling.short_divisors)


def _places(config: DecoderConfig, names: Iterable[str]) -> dict[str, tuple[str, int, int]]:
    """For each weight its name in llama.cpp, the heads whose channels have another order there, and what is added to it."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    family = families()[config.name]
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    known = get_tensor_name_map(MODEL_ARCH(numbers[family.gguf_architecture]), config.layers)
    offset = 1 if config.parts.norm_weight == "1 + w" else 0
    places = {}
    for name in names:
        stem, _, kind = name.rpartition(".")
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(stem.rpartition(".")[2], 0)
        found = known.get_name(stem)
        assert found is not None, name  # the weights are those of the architecture
        places[name] = (f"{found}.{kind}", heads if family.gguf_interleaved else 0, offset if stem.endswith("norm") else 0)
    return places


def read_tensors(
    config: DecoderConfig, names: Iterable[str], stored: Mapping[str, T], numbers: Callable[[T], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The weights of these names from the tensors of a file; `numbers` reads one. InputError unless it has exactly them."""
    places = _places(config, names)
    left = {name for name in stored if not name.startswith("rope_f")}
    for name, (found, heads, offset) in places.items():
        if found not in stored:
            raise InputError(f"{found}: expected a tensor of a {config.name}, got none")
        left.discard(found)
        weight = numbers(stored[found])
        yield name, (in_halves(weight, heads) if heads else weight) - offset if heads or offset else weight
    if config.tied and not families()[config.name].gguf_ties:
        left.discard("output.weight")
    if left:
        raise InputError(f"{min(left)}: expected only the tensors of a {config.name}, got this one too")


def in_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    pairs = weight.view(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """`weight` (heads * E, ...) with the rows of each head in the order 0, E / 2, 1, E / 2 + 1, ..."""
    pairs = weight.view(heads, 2, -1, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)

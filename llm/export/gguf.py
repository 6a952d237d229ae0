"""Writes a model folder as one GGUF file, for llama.cpp and the programs built on it.

The file has weights, tokenizer, special tokens and chat template. An architecture's folder in `llm.models` says how its
weights and sizes are written, `llm.export.gguf_tokenizer` writes the tokenizer; this module has the precisions.
"""

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.export import GgufPrecision
from llm.export.gguf_tokenizer import write_tokenizer
from llm.files import whole_file
from llm.models import architectures
from llm.models.checkpoint import CONFIG, read_config, read_weights
from llm.models.sampling_defaults import Sampling, as_sampled, read_sampling

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

BLOCK = 32  # numbers that share a scale; a matrix whose rows are no multiple of it stays in f16, as in llama.cpp's tools
FULL = ("f32", "f16", "bf16")  # precisions without blocks
# In fewer than 8 bits, llama.cpp's tools also keep the head and the embedding, which may be the head, in more bits.
IN_8_BITS = ("token_embd.weight", "output.weight")

logging.getLogger("gguf").setLevel(logging.WARNING)  # at INFO it logs every tensor


def write_gguf(checkpoint: Path, target: Path, *, precision: GgufPrecision) -> dict[str, Any]:
    """Write the model in `checkpoint` to `target`; returns facts for the record.

    Vectors stay in f32. InputError for a tokenizer that llama.cpp does not support.
    """
    from gguf import GGUFWriter, LlamaFileType

    config, vocab_size = read_config(checkpoint / CONFIG)
    weights = read_weights(checkpoint, config, vocab_size=vocab_size)
    layout = architectures()[config.name].gguf()
    writer = GGUFWriter(None, layout.architecture_of(config))
    writer.add_file_type(LlamaFileType["ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"])
    writer.add_quantization_version(2)  # of ggml's blocks: GGML_QUANT_VERSION
    writer.add_vocab_size(vocab_size)
    layout.write_sizes(writer, config)
    tokenizer = write_tokenizer(writer, checkpoint, vocab_size=vocab_size)
    _write_sampling(writer, read_sampling(checkpoint))
    kept: dict[str, int] = {}
    for tensor_name, tensor in layout.tensors(config, weights):
        data, stored = _stored(tensor_name, tensor, precision)
        kept[stored.name.lower()] = kept.get(stored.name.lower(), 0) + 1
        writer.add_tensor(tensor_name, data, raw_dtype=stored)
    with whole_file(target) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {
        "bytes": target.stat().st_size,
        "tensors": kept,
        "tokenizer": tokenizer.model,
        "pre_tokenizer": tokenizer.pre_tokenizer,
        "tokenizer_differences": list(tokenizer.differences),
        "context": config.context,
    }


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of a file have each type."""
    from gguf import GGUFReader

    return dict(Counter(tensor.tensor_type.name.lower() for tensor in GGUFReader(path).tensors))


def _write_sampling(writer: "GGUFWriter", sampling: Sampling) -> None:
    """Write the sampling defaults, which llama.cpp takes where a request does not say otherwise."""
    numbers = as_sampled(sampling)
    writer.add_sampling_temp(float(numbers["temperature"]))
    if "top_k" in numbers:
        writer.add_sampling_top_k(int(numbers["top_k"]))
    if "top_p" in numbers:
        writer.add_sampling_top_p(float(numbers["top_p"]))
    if "min_p" in numbers:
        writer.add_sampling_min_p(float(numbers["min_p"]))
    if "repetition_penalty" in numbers:
        writer.add_sampling_penalty_repeat(float(numbers["repetition_penalty"]))


def _stored(name: str, tensor: Tensor, precision: GgufPrecision) -> "tuple[NDArray[Any], GGMLQuantizationType]":
    """The data of a tensor in the file, and its type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    numbers = np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())
    if numbers.ndim == 1:
        wanted = GGMLQuantizationType.F32
    elif precision not in FULL and numbers.shape[-1] % BLOCK:
        wanted = GGMLQuantizationType.F16
    elif precision not in FULL and name in IN_8_BITS:
        wanted = GGMLQuantizationType.Q8_0
    else:
        wanted = GGMLQuantizationType[precision.upper()]
    return quantize(numbers, wanted), wanted

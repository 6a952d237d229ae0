"""Unpacks a GGUF file into a model folder, as Transformers saves one: what `llm.models.import_checkpoint` takes over.

Weights of any kind that the gguf package can dequantize are read: f32, f16, bf16, blocks of 4 to 8 bits and K-quants. They are
stored in the precision of the file, and in fp16 if that is of fewer bits, whose rounding is far below that of the file. The
architecture is that of a family here (`Family.gguf_architecture`), and the tokenizer its own where it lies beside the file,
else the one that llama.cpp runs.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llm.errors import InputError
from llm.files import write_json, write_tensors
from llm.models import architectures
from llm.models.checkpoint import CONFIG, TOKENIZER_FILES, WEIGHTS, read_config, tensor_shapes
from llm.models.families import families
from llm.models.sampling_defaults import FILE
from llm.tokenizer.from_gguf import write_from_gguf

if TYPE_CHECKING:
    from gguf import GGUFReader

# Keys of the file after its architecture -> fields of config.json.
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def unpack_gguf(path: Path, target: Path) -> None:
    """Write the model in `path` into the folder `target`; InputError names what is not supported."""
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
    target.mkdir(parents=True)
    try:
        reader, fields = _open(path)
    except (ValueError, KeyError, IndexError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: expected a GGUF file, got one that cannot be read: {error}") from error
    try:
        config = _config(reader, fields)
        _write_tokenizer(path, target, fields)
        dtype = _dtype(reader)
        write_json(target / CONFIG, config | {"dtype": str(dtype).removeprefix("torch.")})
        write_json(target / FILE, _generation(fields))
        _write_weights(reader, target, dtype=dtype)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _open(path: Path) -> "tuple[GGUFReader, dict[str, Any]]":
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return reader, {name: _decimal(field.contents()) for name, field in reader.fields.items()}


def _decimal(value: Any) -> Any:
    """A number that is stored in fp32 as the shortest decimal number that is stored so, which is what was meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _config(reader: "GGUFReader", fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json."""
    architecture = fields.get("general.architecture")
    alike = [family for family in families().values() if family.gguf_architecture == architecture]
    marked = [family for family in alike if family.gguf_marker and f"{architecture}.{family.gguf_marker}" in fields]
    family = next((family for family in [*marked, *alike] if family in marked or family.gguf_marker is None), None)
    if family is None:
        known = sorted({family.gguf_architecture for family in families().values()})
        raise InputError(f"general.architecture: expected one of {', '.join(map(repr, known))}, got {architecture!r}")
    own = {
        name.removeprefix(f"{architecture}."): value for name, value in fields.items() if name.startswith(f"{architecture}.")
    }
    if missing := [key for key in SIZES if not isinstance(own.get(key), int)]:
        raise InputError(f"{architecture}.{missing[0]}: expected a number, got {own.get(missing[0])!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config: dict[str, Any] = {field: own[key] for key, field in SIZES.items()}
    heads = own["attention.head_count"]
    config |= {
        "model_type": family.name,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": own.get("attention.key_length", own["embedding_length"] // heads),
        "rms_norm_eps": own.get("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": float(own.get("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    if (rotated := own.get("rope.dimension_count", config["head_dim"])) != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    config |= {
        "rope_scaling": _scaling(own, {name: _numbers(tensors[name]) for name in tensors if name.startswith("rope_f")}, config)
    }
    if "rope.scaling.original_context_length" in own:
        config["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    return config | family.gguf_fields(own, config)


def _scaling(own: Mapping[str, Any], tables: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Transformers' `rope_scaling`; llama.cpp has the frequencies of the llama3 and longrope kinds as tables."""
    if "rope_factors_long.weight" in tables:
        long, short = (tables[f"rope_factors_{name}.weight"].tolist() for name in ("long", "short"))
        factors = {"attention_factor": own["rope.scaling.attn_factor"]} if "rope.scaling.attn_factor" in own else {}
        return {"rope_type": "longrope", "long_factor": long, "short_factor": short, **factors}
    if "rope_freqs.weight" in tables:
        return _llama_3(tables["rope_freqs.weight"], config)
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor")
    if kind == "none" or factor is None:
        return None
    scaling = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        scaling |= {field: own[f"rope.scaling.{key}"] for key, field in names.items() if f"rope.scaling.{key}" in own}
        if (times := own.get("rope.scaling.attn_factor", 1.0)) != 1:  # llama.cpp multiplies by that of the scaling as well
            scaling["attention_factor"] = round(times * (0.1 * math.log(factor) + 1.0), 6)
    return scaling


def _llama_3(divisors: Tensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """The llama3 scaling of these divisors: that of Llama 3 itself, since a file does not name its numbers."""
    factor, original = float(divisors.max()), 8192
    frequencies = config["rope_theta"] ** -(torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
    turns = original * frequencies / (2 * torch.pi)
    smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(divisors.double(), expected, rtol=1e-3):
        raise InputError(
            "rope_freqs.weight: expected the frequencies of Llama 3, got others, whose numbers a file does not name"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _write_tokenizer(path: Path, target: Path, fields: Mapping[str, Any]) -> None:
    """The tokenizer beside the file, if it has the tokens of the file; else the one in it."""
    for name in TOKENIZER_FILES:
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, target / name)
    if not (target / "tokenizer.json").exists():
        tokenizer = {name.removeprefix("tokenizer."): value for name, value in fields.items() if name.startswith("tokenizer.")}
        if "ggml.tokens" not in tokenizer:
            raise InputError(
                "tokenizer.ggml.tokens: expected the tokens, got none: put the model's tokenizer.json beside the file"
            )
        write_from_gguf(target, tokenizer)
        return
    vocabulary = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = fields.get("tokenizer.ggml.tokens", [])
    if other := next(
        (token for token, number in vocabulary.items() if number >= len(tokens) or tokens[number] != token), None
    ):
        raise InputError(f"tokenizer.json beside it: expected the tokens of the file, got {other!r} at {vocabulary[other]:,}")


def _generation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens that end an answer, and the sampling defaults."""
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found = {field: fields.get(f"general.sampling.{name}") for name, field in SAMPLING.items()}
    sampling = {field: value for field, value in found.items() if value is not None}
    samples = bool(sampling.get("temperature"))
    return {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)), "do_sample": samples} | sampling


def _dtype(reader: "GGUFReader") -> torch.dtype:
    """The precision to store: that of the file's largest matrices."""
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return DTYPES.get(max(sizes, key=lambda name: sizes[name]), torch.float16) if sizes else torch.float32


def _numbers(tensor: Any) -> Tensor:
    """The numbers of a tensor in fp32, in the order of torch: the shape of the file is the other way round."""
    from gguf.quants import dequantize

    try:
        numbers = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise InputError(
            f"{tensor.name}: expected a type that the gguf package dequantizes, got {tensor.tensor_type.name}"
        ) from None
    return torch.from_numpy(numbers.copy()).float().reshape(*(int(size) for size in reversed(tensor.shape)))


def _write_weights(reader: "GGUFReader", target: Path, *, dtype: torch.dtype) -> None:
    """Write the weights under Transformers' names; InputError unless they are exactly those of the architecture."""
    config, vocab_size = read_config(target / CONFIG)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = tensor_shapes(config, vocab_size=vocab_size)
    found = architectures()[config.name].gguf().read_tensors(config, list(shapes), tensors, _numbers)
    write_tensors(target / WEIGHTS, {name: weight.to(dtype).contiguous() for name, weight in found})

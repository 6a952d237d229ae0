"""A model folder on disk, exactly as stock Transformers reads and writes it; nothing of a training's state.

`config.json` (LlamaForCausalLM), `model.safetensors`, the tokenizer's files and `generation_config.json`. Weights are read
from safetensors only, and a configuration that the hand-written model cannot honour is refused by the field that is at fault.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm.errors import InputError
from llm.models import architectures
from llm.models.llama.config import LlamaConfig
from llm.models.llama.model import Llama

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# What the model computes however it is configured; another value in a config.json means another model.
FIXED: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def save_checkpoint(folder: Path, model: Llama, tokenizer_folder: Path) -> None:
    """Write the model and a copy of the tokenizer's files into `folder`; a tied head is stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        source = tokenizer_folder / name
        if source.exists() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)
    special = _special_ids(folder)
    _write_json(folder / "config.json", _transformers_config(model, special))
    _write_json(folder / "generation_config.json", special | {"do_sample": False})
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tied:
        del weights["lm_head.weight"]
    temporary = folder / "model.safetensors.tmp"
    save_file(weights, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")


def load_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", dropout: float = 0.0
) -> Llama:
    """Open a model folder. `dropout` is for training it further: a checkpoint does not say what it was trained with."""
    config, vocab_size = read_config(folder / "config.json", dropout=dropout)
    with torch.device("meta"):  # no time spent on drawing weights that are replaced at once
        model = architectures()[config.name].build(config, vocab_size=vocab_size)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors", device=str(device)).items()}
    if config.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(f"{folder / 'model.safetensors'}: the weights are not those of its config.json: {error}") from error
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def read_config(path: Path, *, dropout: float = 0.0) -> tuple[LlamaConfig, int]:
    """The architecture and vocabulary size in a Transformers `config.json`; InputError names a field we cannot honour."""
    found = json.loads(path.read_text(encoding="utf-8"))
    for field, wanted in FIXED.items():
        if found.get(field, wanted) != wanted:
            raise InputError(f"{path}: {field} wants {wanted!r}, found {found[field]!r}: this architecture is not supported")
    rope = dict(found.get("rope_parameters") or found.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise InputError(f"{path}: rope_type wants 'default', found {rope_type!r}: this scaling is not supported")
    heads = found["num_attention_heads"]
    config = LlamaConfig(
        hidden_size=found["hidden_size"],
        layers=found["num_hidden_layers"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_size=found.get("head_dim") or found["hidden_size"] // heads,
        intermediate_size=found["intermediate_size"],
        context=found["max_position_embeddings"],
        rope_base=rope.get("rope_theta") or found.get("rope_theta") or 10000.0,
        norm_eps=found.get("rms_norm_eps", 1e-6),
        dropout=dropout,
        tied=found.get("tie_word_embeddings", False),
    )
    return config, found["vocab_size"]


def _transformers_config(model: Llama, special: dict[str, int | None]) -> dict[str, Any]:
    config = model.config
    return (
        {"architectures": ["LlamaForCausalLM"]}
        | FIXED
        | {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "max_position_embeddings": config.context,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "tie_word_embeddings": config.tied,
            "vocab_size": model.vocab_size,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "dtype": str(model.model.embed_tokens.weight.dtype).removeprefix("torch."),
        }
        | special
    )


def _special_ids(folder: Path) -> dict[str, int | None]:
    """Ids of the begin, end and padding tokens, read from the tokenizer's files in `folder`."""
    ids = {
        token["content"]: token["id"]
        for token in json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    }
    named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))

    def of(name: str) -> int | None:
        token = named.get(name)
        return ids.get(token["content"] if isinstance(token, dict) else token)

    return {"bos_token_id": of("bos_token"), "eos_token_id": of("eos_token"), "pad_token_id": of("pad_token")}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)

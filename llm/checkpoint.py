"""A model folder on disk, exactly as stock Transformers reads and writes it; nothing of a training's state.

`config.json`, `model.safetensors`, the tokenizer's files and `generation_config.json`. Weights are read
from safetensors only, and a configuration that the hand-written model cannot honour is refused by the field that is at fault.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from llm.errors import InputError
from llm.files import write_json, write_tensors
from llm.models import architectures

if TYPE_CHECKING:  # whose methods every architecture has
    from llm.models.llama.config import LlamaConfig
    from llm.models.llama.model import Llama

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def save_checkpoint(folder: Path, model: "Llama", tokenizer_folder: Path) -> None:
    """Write the model and a copy of the tokenizer's files into `folder`; a tied head is stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        source = tokenizer_folder / name
        if source.exists() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)
    special = _special_ids(folder)
    architecture = architectures()[model.config.name]
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    config = architecture.to_transformers(model.config) | {"vocab_size": model.vocab_size, "dtype": dtype} | special
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special | {"do_sample": False})
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tied:
        del weights["lm_head.weight"]
    write_tensors(folder / "model.safetensors", weights)


def load_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", dropout: float = 0.0
) -> "Llama":
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


def read_config(path: Path, *, dropout: float = 0.0) -> tuple["LlamaConfig", int]:
    """The architecture and vocabulary size in a Transformers `config.json`; InputError names a field we cannot honour."""
    found = json.loads(path.read_text(encoding="utf-8"))
    by_type = {architecture.model_type: architecture for architecture in architectures().values()}
    model_type = found.get("model_type")
    if model_type not in by_type:
        wanted = " or ".join(map(repr, by_type))
        raise InputError(f"{path}: model_type wants {wanted}, found {model_type!r}: this architecture is not supported")
    try:
        return by_type[model_type].from_transformers(found, dropout=dropout), found["vocab_size"]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


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

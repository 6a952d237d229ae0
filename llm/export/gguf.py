"""Writes a model folder as one GGUF file, for llama.cpp and the programs built on it.

The file has weights, tokenizer, special tokens and chat template. An architecture's folder in `llm.models` says how its
weights and sizes are written; this module has the precisions and the tokenizer. llama.cpp knows pre-tokenizers only by name
(`llm.tokenizer.pretokenizers`), or has the pieces of sentencepiece.
"""

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from llm.errors import InputError
from llm.export import GgufPrecision
from llm.files import whole_file
from llm.models import architectures
from llm.models.checkpoint import CONFIG, read_config, read_weights
from llm.tokenizer.pretokenizers import pre_tokenizer_name_of
from llm.tokenizer.tokenizer import TOKENIZER_FILE, TextTokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Q8_BLOCK = 32  # numbers that share a scale; a matrix whose rows are no multiple of it stays in f16, as in llama.cpp's tools

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # the token of a single byte

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
    pre_tokenizer = _write_tokenizer(writer, checkpoint, vocab_size=vocab_size)
    kept: dict[str, int] = {}
    for tensor_name, tensor in layout.tensors(config, weights):
        data, stored = _stored(tensor, precision)
        kept[stored.name.lower()] = kept.get(stored.name.lower(), 0) + 1
        writer.add_tensor(tensor_name, data, raw_dtype=stored)
    with whole_file(target) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {"bytes": target.stat().st_size, "tensors": kept, "pre_tokenizer": pre_tokenizer, "context": config.context}


def _stored(tensor: Tensor, precision: GgufPrecision) -> "tuple[NDArray[Any], GGMLQuantizationType]":
    """The data of a tensor in the file, and its type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    numbers = np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())
    if numbers.ndim == 1:
        wanted = GGMLQuantizationType.F32
    elif precision == "q8_0" and numbers.shape[-1] % Q8_BLOCK:
        wanted = GGMLQuantizationType.F16
    else:
        wanted = GGMLQuantizationType[precision.upper()]
    return quantize(numbers, wanted), wanted


def _write_tokenizer(writer: "GGUFWriter", folder: Path, *, vocab_size: int) -> str:
    """Write tokens, merges, special tokens and chat template; returns llama.cpp's name of the pre-tokenizer."""
    from gguf import TokenType

    stored = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    pieces = bool(stored["model"].get("byte_fallback"))
    pre_tokenizer = "default" if pieces else pre_tokenizer_name_of(stored)
    if pre_tokenizer is None:
        raise InputError(
            f"{folder / TOKENIZER_FILE}: expected a byte-level BPE with a pre-tokenizer of llm/tokenizer/pretokenizers.py, or "
            "sentencepiece's pieces, got another tokenizer, which llama.cpp would replace by one that gives other tokens"
        )
    tokenizer = TextTokenizer.load(folder)
    tokens = [f"[UNUSED{number}]" for number in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, number in stored["model"]["vocab"].items():
        tokens[number] = token
        types[number] = TokenType.BYTE if pieces and _BYTE.fullmatch(token) else TokenType.NORMAL
    for added in stored["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    for token in tokenizer.special_tokens:
        types[tokenizer.token_id(token)] = TokenType.CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pieces:  # llama.cpp merges the pair whose piece has the highest score
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
        writer.add_add_space_prefix(_begins_with_space(folder))
    else:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.begin)
    writer.add_eos_token_id(tokenizer.end)
    writer.add_pad_token_id(tokenizer.padding)
    writer.add_add_bos_token(adds_begin(folder, tokenizer))
    writer.add_add_eos_token(False)
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), tokenizer.ends[1:], strict=False):
        add(token)
    if tokenizer.ends[3:]:
        raise InputError(
            f"{folder}: expected at most 3 tokens that end an answer (llama.cpp's limit), got {len(tokenizer.ends)}"
        )
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template)
    return pre_tokenizer


def _begins_with_space(folder: Path) -> bool:
    """Whether a word at the beginning of a text is encoded as after a space."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    tokens: list[str] = tokenizer.encode("a", add_special_tokens=False).tokens
    return tokens[0].startswith("\u2581")


def adds_begin(folder: Path, tokenizer: TextTokenizer) -> bool:
    """Whether Transformers puts the begin token before texts and before chats; llama.cpp can only do both or neither."""
    ids: list[int] = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode("a").ids
    chat = tokenizer.encode_prompt([{"role": "user", "content": "a"}]) if tokenizer.template is not None else ids
    return ids[0] == chat[0] == tokenizer.begin

"""Builds the tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`: what llama.cpp computes under its name.

`llm.tokenizer.llama_cpp` is the other way. A GGUF file does not hold all of a tokenizer: whether text was normalized before is
not in it. So where its own `tokenizer.json` is at hand, that one is to be taken.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.errors import InputError
from llm.tokenizer.llama_cpp import SPACE, byte_level
from llm.tokenizer.pretokenizers import EXPRESSIONS, WHOLE_WORDS_FIRST

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # llama.cpp's types of tokens
USED = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE)
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
# Other names in llama.cpp for the same (llama_vocab::impl::load).
SAME = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "gpt-2": ("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm", "hy_v4"),
    "dbrx": ("smaug-bpe", "glm4", "chatglm-bpe"),
    "gpt-4o": ("llama4", "kanana2", "minimax-m2"),
}
_NAMES = {other: name for name, others in SAME.items() for other in others}

Fields = Mapping[str, Any]  # of the file, without the prefix tokenizer.


def write_from_gguf(folder: Path, fields: Fields) -> None:
    """Write the tokenizer of a GGUF file into `folder`; InputError if it is of a kind that cannot be rebuilt."""
    match fields.get("ggml.model"):
        case "gpt2":
            tokenizer = _words(fields)
        case "llama":
            tokenizer = _pieces(fields)
        case other:
            raise InputError(
                f"tokenizer.ggml.model: expected 'gpt2' or 'llama', got {other!r}: put the model's tokenizer.json beside "
                "the file"
            )
    tokens: Sequence[str] = fields["ggml.tokens"]
    added = [
        {**_ADDED, "id": number, "content": tokens[number], "special": kind in (CONTROL, UNKNOWN)}
        for number, kind in enumerate(_types(fields))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None, **tokenizer}
    begin = fields.get("ggml.bos_token_id")
    if fields.get("ggml.add_bos_token", fields["ggml.model"] == "llama") and begin is not None:
        whole["post_processor"] = _beginning(tokens[begin], begin)
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    named = {SPECIAL[name]: fields.get(f"ggml.{name}_token_id") for name in SPECIAL}
    config: dict[str, Any] = {name: tokens[number] for name, number in named.items() if number is not None}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if (template := fields.get("chat_template")) is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _types(fields: Fields) -> list[int]:
    return list(fields.get("ggml.token_type") or [NORMAL] * len(fields["ggml.tokens"]))


def _vocabulary(fields: Fields, *kinds: int) -> dict[str, int]:
    """The tokens of these kinds. Added ones belong to it too: the library would give them other numbers."""
    found = zip(fields["ggml.tokens"], _types(fields), strict=True)
    return {token: number for number, (token, kind) in enumerate(found) if kind in kinds}


def _words(fields: Fields) -> dict[str, Any]:
    name = _NAMES.get(found := fields.get("ggml.pre", "default"), found)
    if name not in EXPRESSIONS:
        raise InputError(
            f"tokenizer.ggml.pre: expected one of {', '.join(map(repr, EXPRESSIONS))} or another name for them, got "
            f"{found!r}: "
            "put the model's tokenizer.json beside the file"
        )
    model = {
        "type": "BPE",
        "vocab": _vocabulary(fields, *USED),
        # The first space of a merge may be its first character.
        "merges": [[merge[: (cut := merge.index(" ", 1))], merge[cut + 1 :]] for merge in fields["ggml.merges"]],
        "ignore_merges": name in WHOLE_WORDS_FIRST,
        "byte_fallback": False,
        "fuse_unk": False,
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"normalizer": None, "pre_tokenizer": byte_level(EXPRESSIONS[name]), "model": model, "decoder": decoder}


def _pieces(fields: Fields) -> dict[str, Any]:
    vocabulary, scores = _vocabulary(fields, NORMAL), fields["ggml.scores"]
    tokens, prefix = fields["ggml.tokens"], bool(fields.get("ggml.add_space_prefix", True))
    unknown = fields.get("ggml.unknown_token_id", 0)
    ordered = sorted((token for token in vocabulary if len(token) > 1), key=lambda token: -scores[vocabulary[token]])
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in ordered
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = {
        "type": "BPE",
        "vocab": _vocabulary(fields, *USED),
        "merges": merges,
        "unk_token": tokens[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace],
        },
        "pre_tokenizer": None,
        "model": model,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _beginning(token: str, number: int) -> dict[str, Any]:
    """A post-processor that writes the begin token before a text."""
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, begin, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}

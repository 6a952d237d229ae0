"""Tiny tokenizers of every kind that llama.cpp knows, written as their publishers write them and trained on the hard
sentences."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hard_sentences import hard_sentences
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm.tokenizer.pretokenizers import EXPRESSIONS

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<think>", "</think>", "<filename>")  # not special: they are tokens in a text too
ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# As in tiktoken.
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(expression: str, **how: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False} | how


def _cased(contractions: str, digits: str) -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{contractions}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{contractions}"
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


DIGITS = {"type": "Digits", "individual_digits": True}
DEEPSEEK = [_split(expression.replace(r"\r", "\r").replace(r"\n", "\n")) for expression in EXPRESSIONS["deepseek-v3"]]
# Published kind -> the name in llama.cpp, what splits text, and further fields.
BYTE_LEVEL: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "gpt-2": ("gpt-2", [], {}),
    "smollm": ("smollm", [DIGITS], {}),
    "qwen2": ("qwen2", [_split(f"{ANY_CASE}|" + LINES % r"\p{N}")], {"normalizer": {"type": "NFC"}}),
    "llama-3": ("llama-bpe", [_split(f"{ANY_CASE}|" + LINES % r"\p{N}{1,3}")], {"ignore_merges": True}),
    "phi-4": ("dbrx", [_split(CL100K, behavior="Removed", invert=True)], {}),
    "deepseek-v3": ("deepseek-v3", DEEPSEEK, {"normalizer": {"type": "Sequence", "normalizers": []}}),
    "nemo": ("tekken", [_split(_cased("", r"\p{N}"))], {"ignore_merges": True}),
    "phi-4-mini": ("gpt-4o", [_split(_cased(f"{ANY_CASE}?", r"\p{N}{1,3}"), behavior="Removed", invert=True)], {}),
    "qwen3.5": ("qwen35", [_split(EXPRESSIONS["qwen35"][0])], {"normalizer": {"type": "NFC"}}),
    "seed-coder": ("seed-coder", [_split(EXPRESSIONS["seed-coder"][0])], {}),
    "minicpm5": ("minicpm5", [*map(_split, EXPRESSIONS["minicpm5"])], {"ignore_merges": True}),
}
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPACES = normalizers.Replace(" ", "▁")
AT_SPACES = pre_tokenizers.Split(" ", "merged_with_previous")
# Published kind -> normalizer, pre-tokenizer, and whether pieces may have spaces inside.
PIECES: dict[str, tuple[Any, Any, bool]] = {
    "llama-2": (PREPEND, None, True),
    "gemma": (SPACES, AT_SPACES, True),
    "mistral": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
    "yi": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), True),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), True),
    "metaspace-split": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True), False),
}


@cache
def _learned_words() -> str:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    learner.train_from_iterator(hard_sentences(), trainer)
    return learner.to_str()


def byte_level(kind: str) -> Tokenizer:
    """A byte-level BPE as one of BYTE_LEVEL."""
    _, splits, fields = BYTE_LEVEL[kind]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": kind in ("gpt-2", "smollm")}
    stored = json.loads(_learned_words())
    stored["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, level]}
    stored["normalizer"] = fields.get("normalizer")
    stored["model"]["ignore_merges"] = fields.get("ignore_merges", False)
    tokenizer = Tokenizer.from_str(json.dumps(stored))
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer)


@cache
def _learned_pieces(inner_spaces: bool) -> str:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=not inner_spaces)
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=["▁"], max_token_length=9)
    learner.train_from_iterator(hard_sentences(300), trainer)
    return json.dumps(json.loads(learner.to_str())["model"])


def every_merge(pieces: Iterable[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """A merge for every pair that makes one of `pieces`, as conversions of sentencepiece have them."""
    return [
        (piece[:cut], piece[cut:])
        for piece in dict.fromkeys(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]


def pieces(kind: str) -> Tokenizer:
    """Pieces with byte fallback as one of PIECES, with a merge for every pair that makes a piece, as conversions have them."""
    normalizer, pre_tokenizer, inner = PIECES[kind]
    learned = json.loads(_learned_pieces(inner))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(names))}
    merges = every_merge(["".join(merge) for merge in learned["merges"]], ids)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _with_added(tokenizer)


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return tokenizer


KINDS: dict[str, Callable[[str], Tokenizer]] = dict.fromkeys(BYTE_LEVEL, byte_level) | dict.fromkeys(PIECES, pieces)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save(folder: Path, kind: str) -> Path:
    """The tokenizer of a kind as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    KINDS[kind](kind).save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML, "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"bos_token": "<s>", "unk_token": "<unk>"} if kind in PIECES else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

"""What a `tokenizer.json` of others may ask for, checked before the tokenizers library builds it.

The library bounds neither the time nor the memory of a normalizer or a decoder: thirty that replace "a" by "aa" make a
gigabyte of a word. Nor does it tell a panic of its own from an error. Here texts may grow by a factor, and sizes have limits
well above those of any known tokenizer.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

LARGEST = 64 << 20  # bytes of the file; that of Gemma 3 has 33 MB
MOST_LISTS = 2_000_000  # and tables in it; Gemma 3 has 520,000, nearly all of two pieces to merge
MOST_TOKENS = 1 << 21  # of the vocabulary; Gemma 3 has 262,144
MOST_ADDED = 50_000  # tokens beside it; Gemma 3 has 6,415
LONGEST_TOKEN = 1000  # characters of an added one, which an automaton looks for
MOST_STEPS = 1000  # of a post-processor, normalizers, and so on
MOST_GROWTH = 64.0  # of a text by all normalizers, or of what is decoded by all decoders
LONGEST_PREFIX = 1000  # characters that a normalizer puts before a text
LONGEST_CHARS_MAP = 16 << 20  # characters in base64; those of sentencepiece have 0.3 MB
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def bounds_fault(text: str) -> str | None:
    """Why a `tokenizer.json` asks for too much; None if it does not. What else is wrong with it, the library tells."""
    if (lists := text.count("[") + text.count("{")) > MOST_LISTS:
        return f"expected at most {MOST_LISTS:,} lists and tables, got {lists:,}"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    try:
        return next(_faults(found), None)
    except (TypeError, AttributeError, ValueError, LookupError, RecursionError) as error:
        return f"expected a tokenizer of the tokenizers library, got fields of other kinds: {error}"


def _faults(found: Mapping[str, Any]) -> Iterator[str]:
    added = found.get("added_tokens") or []
    if len(added) > MOST_ADDED:
        yield f"added_tokens: expected at most {MOST_ADDED:,}, got {len(added):,}"
    if long := [token for token in added if len(token["content"]) > LONGEST_TOKEN]:
        yield f"added_tokens: expected at most {LONGEST_TOKEN:,} characters, got {len(long[0]['content']):,}"
    vocabulary = found["model"].get("vocab") or {}
    if len(vocabulary) > MOST_TOKENS:
        yield f"model.vocab: expected at most {MOST_TOKENS:,} tokens, got {len(vocabulary):,}"
    numbers = [token["id"] for token in added] + list(vocabulary.values() if isinstance(vocabulary, dict) else ())
    if numbers and max(numbers) >= MOST_TOKENS:
        yield f"expected ids below {MOST_TOKENS:,}, got {max(numbers):,}"
    if (kind := found["model"].get("type")) in ("WordPiece", "WordLevel") and found["model"]["unk_token"] not in vocabulary:
        yield f"model.unk_token: expected a token of the vocabulary of {kind}, got {found['model']['unk_token']!r}"
    for part in PARTS:
        steps = list(_steps(found.get(part)))
        if len(steps) > MOST_STEPS:
            yield f"{part}: expected at most {MOST_STEPS:,} steps, got {len(steps):,}"
        growth = 1.0
        for step in steps:
            growth *= _growth(step)
            yield from (f"{part}: {fault}" for fault in _faults_of(step))
        if growth > MOST_GROWTH:
            yield f"{part}: expected one that makes a text at most {MOST_GROWTH:g} times as long, got {growth:.3g} times"


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The single steps of a part, which may be sequences of sequences."""
    if not isinstance(part, Mapping):
        return
    inner = [value for name, value in part.items() if name in ("normalizers", "pretokenizers", "processors", "decoders")]
    if not inner:
        yield part
    for steps in inner:
        for step in steps:
            yield from _steps(step)


def _growth(step: Mapping[str, Any]) -> float:
    """How much longer a step may make a text."""
    if step.get("type") == "Replace":
        pattern = step["pattern"]
        matched = len(pattern["String"].encode()) if "String" in pattern else 1
        return max(1.0, len(step["content"].encode()) / max(matched, 1))
    return 1.0


def _faults_of(step: Mapping[str, Any]) -> Iterator[str]:
    match step.get("type"):
        case "Prepend" if len(step["prepend"]) > LONGEST_PREFIX:
            yield f"prepend: expected at most {LONGEST_PREFIX:,} characters, got {len(step['prepend']):,}"
        case "Replace" if step["pattern"] in ({"String": ""}, {"Regex": ""}):
            yield "pattern: expected one that is not empty"
        case "Precompiled" if not 8 <= len(step["precompiled_charsmap"]) <= LONGEST_CHARS_MAP:
            found = len(step["precompiled_charsmap"])
            yield f"precompiled_charsmap: expected 8 to {LONGEST_CHARS_MAP:,} characters of base64, got {found:,}"
        case "Precompiled":
            yield from _chars_map_fault(step["precompiled_charsmap"])
        case "Strip" if max(step.get("start", 0), step.get("stop", 0)) > LONGEST_PREFIX:
            yield f"start, stop: expected at most {LONGEST_PREFIX:,}, got {step.get('start'):,} and {step.get('stop'):,}"
        case "TemplateProcessing" if max(len(step["single"]), len(step["pair"])) > MOST_STEPS:
            yield f"single: expected at most {MOST_STEPS:,} pieces, got {len(step['single']):,}"


def _chars_map_fault(encoded: str) -> Iterator[str]:
    """The fault of a map of sentencepiece: a length, so many bytes of a trie in units of 4, and texts."""
    import base64

    content = base64.b64decode(encoded)
    size = int.from_bytes(content[:4], "little")
    if size % 4 or size < 4 or 4 + size > len(content):
        yield f"precompiled_charsmap: expected a trie of {size:,} bytes, got {len(content) - 4:,}"

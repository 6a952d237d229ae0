"""Import of a model folder from elsewhere: checked, and written again in the one form that everything here reads.

Nothing in it is executed or unpickled. Weights keep their precision; shards are cut as `llm.models.checkpoint` cuts them. The
tokenizer stays as it is; training and generation need two additions: a chat template, if there is none, and the token that
ends an answer among those that end generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llm.errors import InputError
from llm.models.added_tokens import with_rows, with_words
from llm.models.checkpoint import CONFIG, read_config, read_weights, write_model
from llm.models.interface import ModelConfig
from llm.models.sampling_defaults import Sampling, read_sampling
from llm.tokenizer.chat_template import PLAIN_TEMPLATE, with_fixed_day
from llm.tokenizer.tokenizer import TextTokenizer

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
_CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]


@dataclass(frozen=True)
class Candidate:
    """The checked contents of a folder, without its weights."""

    folder: Path
    config: ModelConfig
    vocab_size: int  # rows of the embedding; the tokenizer may have fewer tokens
    tokenizer: TextTokenizer
    sampling: Sampling  # how its publisher draws answers


def inspect_checkpoint(folder: Path, *, chat_template: str | None = None) -> Candidate:
    """Check the configuration and the tokenizer of a model folder, whose weights may still be missing.

    `chat_template` replaces its own. InputError names a field that is not supported.
    """
    config, vocab_size = read_config(folder / CONFIG)
    tokenizer = TextTokenizer.load(folder)
    if tokenizer.vocab_size > vocab_size and tokenizer.end < vocab_size:
        tokenizer = tokenizer.within(vocab_size)  # Gemma 3's text models have no row for the token of pictures
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{folder / CONFIG}: vocab_size: expected room for all {tokenizer.vocab_size:,} tokens of tokenizer.json, "
            f"got {vocab_size:,}"
        )
    template = with_fixed_day(chat_template or tokenizer.template or PLAIN_TEMPLATE)
    tokenizer = _with_answer_end(tokenizer.with_template(template), folder)
    return Candidate(folder, config, vocab_size, tokenizer, read_sampling(folder))


def import_checkpoint(candidate: Candidate, target: Path, *, add_tokens: Sequence[str] = ()) -> dict[str, object]:
    """Write the model into `target`, with `add_tokens` in its vocabulary; returns the facts for its record."""
    config = candidate.config
    weights = read_weights(candidate.folder, config, vocab_size=candidate.vocab_size)
    for name, tensor in weights.items():
        if tensor.dtype not in PRECISIONS:
            wanted = ", ".join(map(_name, PRECISIONS))
            raise InputError(f"{candidate.folder}: {name}: expected one of {wanted}, got {_name(tensor.dtype)}")
    added: dict[str, object] = {}
    if add_tokens:
        tokenizer, spelled = with_words(candidate.tokenizer, add_tokens)
        weights, candidate = with_rows(weights, spelled), replace(candidate, tokenizer=tokenizer)
        added = {"added_tokens": len(spelled), "pieces_of_added_tokens": sum(map(len, spelled.values()))}
    candidate.tokenizer.save(target)
    write_model(target, config, weights, tokenizer=candidate.tokenizer, sampling=candidate.sampling)
    return {
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "dtype": _name(weights["model.embed_tokens.weight"].dtype),
        "context": config.context,
        "vocab_size": len(weights["model.embed_tokens.weight"]),
        "tokens": candidate.tokenizer.vocab_size,
    } | added


def _with_answer_end(tokenizer: TextTokenizer, folder: Path) -> TextTokenizer:
    """The tokenizer with the token that its template puts after an answer added to `ends`; InputError where there is none."""
    (parts,) = tokenizer.encode_parts([_CHAT])
    if isinstance(parts, InputError):
        raise InputError(f"{folder}: {parts}") from parts
    ends = {
        part.ids[last]
        for part in parts
        for last in range(len(part.ids))
        if part.loss_mask[last] and not any(part.loss_mask[last + 1 : last + 2])
    }
    if len(ends) != 1 or not ends <= {tokenizer.token_id(token) for token in tokenizer.special_tokens}:
        found = ", ".join(repr(tokenizer.decode([token], special=True)) for token in sorted(ends)) or "nothing"
        raise InputError(
            f"{folder}: chat template: expected each part that it marks as learned to end with the same special token, by "
            f"which the model learns to stop, got {found}"
        )
    return tokenizer.with_template(tokenizer.template or "", ends=sorted(ends))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

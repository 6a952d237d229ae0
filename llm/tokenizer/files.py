"""The files of a tokenizer in a folder, as versions of Transformers write them: tokens, their names, and the chat template."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llm.errors import InputError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"  # the chat template, in newer versions of Transformers
SPECIAL_FILE = "special_tokens_map.json"  # the special tokens, in older versions
GENERATION_FILES = ("generation_config.json", "config.json")  # of a model; the first that names end tokens is used
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
ENDS_OF_TURNS = ("eot_token", "eom_token")  # names in tokenizer_config.json for further tokens that end an answer


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, which neither cuts nor pads what it encodes; InputError if it is no such file."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception if it cannot read a file
        raise InputError(f"{path}: expected a tokenizer of the tokenizers library, got another file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that have a name, by Transformers' names."""
    found = _json(folder / SPECIAL_FILE) | {name: value for name, value in _json(folder / CONFIG_FILE).items() if value}
    tokens = {name: found[name] for name in NAMED if found.get(name)}
    return {name: token["content"] if isinstance(token, dict) else str(token) for name, token in tokens.items()}


def chat_template(folder: Path) -> str | None:
    """The chat template, in any of the places where versions of Transformers put it; of several named ones, the default."""
    if (path := folder / TEMPLATE_FILE).exists():
        return path.read_text(encoding="utf-8")
    found = _json(folder / CONFIG_FILE).get("chat_template")
    if isinstance(found, list):
        found = {item["name"]: item["template"] for item in found}.get("default")
    return None if found is None else str(found)


def model_ends(folder: Path) -> list[int]:
    """The tokens that end an answer of the model in `folder`."""
    for name in GENERATION_FILES:
        found = _json(folder / name).get("eos_token_id")
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


def ends_of_turns(folder: Path) -> list[str]:
    """The tokens that end an answer, by their names in tokenizer_config.json."""
    config = _json(folder / CONFIG_FILE)
    own = config.get("extra_special_tokens")
    found = (own if isinstance(own, dict) else {}) | config
    return [str(found[name]) for name in ENDS_OF_TURNS if isinstance(found.get(name), str)]


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found

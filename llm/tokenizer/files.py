"""The files of a tokenizer in a folder, as versions of Transformers write them: tokens, their names, and the chat template."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llm.errors import InputError
from llm.files import read_json, read_text
from llm.tokenizer.bounds import LARGEST, MOST_TOKENS, bounds_fault

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"  # the chat template, in newer versions of Transformers
SPECIAL_FILE = "special_tokens_map.json"  # the special tokens, in older versions
GENERATION_FILES = ("generation_config.json", "config.json")  # of a model; the first that names end tokens is used
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
PANIC = "PanicException"  # of pyo3, which has no other name for it
LONGEST_TEMPLATE = 1 << 20  # characters; the longest known have 20,000
MOST_ENDS = 1000  # tokens that end an answer
ENDS_OF_TURNS = ("eot_token", "eom_token")  # names in tokenizer_config.json for further tokens that end an answer


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, which neither cuts nor pads what it encodes; InputError if it is no such file."""
    text = read_text(path, LARGEST)
    if fault := bounds_fault(text):
        raise InputError(f"{path}: {fault}")
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:  # the library raises a bare Exception if it cannot read a file
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise InputError(f"{path}: expected a tokenizer of the tokenizers library, got another file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that have a name, by Transformers' names."""
    found = _json(folder / SPECIAL_FILE) | {name: value for name, value in _json(folder / CONFIG_FILE).items() if value}
    tokens = {name: found[name] for name in NAMED if found.get(name)}
    return {name: str(token.get("content") if isinstance(token, dict) else token) for name, token in tokens.items()}


def chat_template(folder: Path) -> str | None:
    """The chat template, in any of the places where versions of Transformers put it; of several named ones, the default."""
    if (path := folder / TEMPLATE_FILE).exists():
        return read_text(path, LONGEST_TEMPLATE)
    found = _json(folder / CONFIG_FILE).get("chat_template")
    if isinstance(found, list):
        named = [item for item in found if isinstance(item, dict)]
        found = {item.get("name"): item.get("template") for item in named if isinstance(item.get("name"), str)}.get("default")
    if found is not None and len(str(found)) > LONGEST_TEMPLATE:
        raise InputError(f"{folder / CONFIG_FILE}: chat_template: expected at most {LONGEST_TEMPLATE:,} characters, got more")
    return None if found is None else str(found)


def model_ends(folder: Path) -> list[int]:
    """The tokens that end an answer of the model in `folder`."""
    for name in GENERATION_FILES:
        found = _json(folder / name).get("eos_token_id")
        if found is None:
            continue
        ends = found if isinstance(found, list) else [found]
        if len(ends) > MOST_ENDS or not all(isinstance(end, int) and 0 <= end < MOST_TOKENS for end in ends):
            raise InputError(f"{folder / name}: eos_token_id: expected the ids of tokens, got {found!r:.80}")
        return list(ends)
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
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found

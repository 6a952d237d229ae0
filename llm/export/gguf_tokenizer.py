"""Writes a tokenizer into a GGUF file: tokens with their types, merges or scores, special tokens and the chat template.

`llm.tokenizer.llama_cpp` says what llama.cpp makes of a tokenizer, and refuses those that it would replace by another.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from llm.errors import InputError
from llm.tokenizer.files import TOKENIZER_FILE
from llm.tokenizer.llama_cpp import BYTE, SPACE, LlamaCppTokenizer, for_llama_cpp, is_merged, merges_of
from llm.tokenizer.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter


def llama_cpp_tokenizer(folder: Path) -> LlamaCppTokenizer:
    """What llama.cpp makes of the tokenizer of a model folder; InputError if it would give other tokens."""
    try:
        return for_llama_cpp(json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8")))
    except InputError as error:
        raise InputError(f"{folder / TOKENIZER_FILE}: {error}") from error


class KnownTokens:
    """The tokens that llama.cpp gives, by what is known of it: texts on which it differs from the model's tokenizer.

    Special tokens are characters in a text, and tokens in a rendered chat.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is that of the model."""
        found = llama_cpp_tokenizer(folder)
        self.differences = found.differences
        self._text_prefix = found.text_prefix
        self._chat = Tokenizer.from_str(json.dumps(dict(found.as_run)))
        self._text = Tokenizer.from_str(json.dumps(dict(found.as_run)))
        self._text.encode_special_tokens = True

    def written(self, text: str) -> str:
        """A text as it is given to llama.cpp."""
        return text if text[:1] in (" ", SPACE) else self._text_prefix + text

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, as it is given to llama.cpp."""
        tokens: list[int] = self._text.encode(text, add_special_tokens=False).ids
        return tokens

    def encode_rendered(self, text: str) -> list[int]:
        """The tokens of a chat that is rendered."""
        tokens: list[int] = self._chat.encode(text, add_special_tokens=False).ids
        return tokens


def write_tokenizer(writer: "GGUFWriter", folder: Path, *, vocab_size: int) -> LlamaCppTokenizer:
    """Write the tokenizer of a model folder; returns what llama.cpp makes of it."""
    found = llama_cpp_tokenizer(folder)
    stored = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    tokenizer = TextTokenizer.load(folder)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre_tokenizer)
    if found.model_name is not None:
        writer.add_name(found.model_name)
    tokens = _write_tokens(writer, stored, tokenizer, found, vocab_size=vocab_size)
    if found.model == "llama":  # llama.cpp merges the pair whose piece has the highest score
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges_of(stored)):
            ranks.setdefault(left + right, rank)
        last = len(stored["model"]["merges"])
        writer.add_token_scores([-float(ranks.get(token, last)) for token in tokens])
        writer.add_add_space_prefix(found.space_prefix)
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges_of(stored)])
    _write_special(writer, folder, tokenizer)
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template)
    return found


def _write_tokens(
    writer: "GGUFWriter", stored: dict[str, Any], tokenizer: TextTokenizer, found: LlamaCppTokenizer, *, vocab_size: int
) -> list[str]:
    """Write the tokens and their types; returns the tokens."""
    from gguf import TokenType

    pieces = found.model == "llama"
    tokens = [f"[UNUSED{number}]" for number in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, number in stored["model"]["vocab"].items():
        tokens[number] = token
        types[number] = TokenType.BYTE if pieces and BYTE.fullmatch(token) else TokenType.NORMAL
    for added in stored["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if not (pieces and is_merged(added, stored["model"]["vocab"])):
            types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    for token in tokenizer.special_tokens:
        types[tokenizer.token_id(token)] = TokenType.CONTROL
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return tokens


def _write_special(writer: "GGUFWriter", folder: Path, tokenizer: TextTokenizer) -> None:
    """Write which tokens begin and end texts and answers, and which of them llama.cpp adds."""
    writer.add_bos_token_id(tokenizer.begin)
    writer.add_eos_token_id(tokenizer.end)
    writer.add_pad_token_id(tokenizer.padding)
    if tokenizer.unknown is not None:  # or llama.cpp takes the first token for it
        writer.add_unk_token_id(tokenizer.unknown)
    writer.add_add_bos_token(adds_begin(folder, tokenizer))
    writer.add_add_eos_token(False)
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), tokenizer.ends[1:], strict=False):
        add(token)
    if tokenizer.ends[3:]:
        raise InputError(
            f"{folder}: expected at most 3 tokens that end an answer (llama.cpp's limit), got {len(tokenizer.ends)}"
        )


def adds_begin(folder: Path, tokenizer: TextTokenizer) -> bool:
    """Whether Transformers puts the begin token before texts and before chats; llama.cpp can only do both or neither."""
    ids: list[int] = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode("a").ids
    chat = tokenizer.encode_prompt([{"role": "user", "content": "a"}]) if tokenizer.template is not None else ids
    return ids[0] == chat[0] == tokenizer.begin

"""`TextTokenizer`: documents and chats to token ids and back.

Its folder is one that Transformers opens with `AutoTokenizer`: `tokenizer.json`, and `tokenizer_config.json` with the chat
template inside. The characters of a special token inside a document are plain text; only a chat template writes special
tokens. `llm.tokenizer.train_bpe` trains one. The tokenizers of other models open too: any `tokenizer.json`, with the special
tokens and the template beside it.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Tokenizer

from llm.errors import InputError
from llm.files import write_text
from llm.tokenizer.chat_template import loss_mask, render_chats, render_with_spans

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"  # the chat template, in newer versions of Transformers
SPECIAL_FILE = "special_tokens_map.json"  # the special tokens, in older versions
GENERATION_FILES = ("generation_config.json", "config.json")  # of a model; the first that names end tokens is used
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
NO_LENGTH_LIMIT = int(1e30)  # Transformers' value for "no limit"; the model has the limit

ChatMessage = Mapping[str, Any]  # role and content, and what else a template reads


class TextTokenizer:
    """Text to token ids and back.

    `end` ends a document; `ends` are all tokens that end an answer. In a vocabulary without a begin token `begin` is the end
    token, so that each document follows the end of another; without a padding token `padding` is the end token, since neither
    attention nor the loss sees padding.
    """

    def __init__(
        self, tokenizer: Tokenizer, named: Mapping[str, str], template: str | None, *, ends: Sequence[int] = ()
    ) -> None:
        """`named` holds eos_token and those of bos_token, pad_token, unk_token that exist; `ends` are added to eos_token."""
        # Removed: it adds special tokens, which are added here by name, and may cut spaces off a token's offsets.
        self._post_processor = tokenizer.post_processor
        tokenizer.post_processor = None
        self._marked = tokenizer  # reads the characters of a special token as that token: for rendered chats
        self._plain = Tokenizer.from_str(tokenizer.to_str())  # reads them as text: for everything else
        self._plain.encode_special_tokens = True
        self.template = template  # the chat template
        self._named = dict(named)
        # Number of tokens, special ones included; one more than the largest id.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        # In the order of their ids.
        self.special_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._any_special = re.compile("|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))))
        self.end = self.token_id(named["eos_token"])
        self.begin = self.token_id(named.get("bos_token", named["eos_token"]))
        self.padding = self.token_id(named.get("pad_token", named["eos_token"]))
        self.ends = tuple(dict.fromkeys([self.end, *ends]))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer in `folder`, which may be a checkpoint's; InputError if a file there cannot be used."""
        path = folder / TOKENIZER_FILE
        if not path.exists():
            raise InputError(f"{path}: expected a tokenizer of the tokenizers library, got no file")
        tokenizer = open_tokenizer(path)
        named = _named_tokens(folder)
        if tokenizer.token_to_id(named.get("eos_token", "")) is None:
            raise InputError(f"{folder / CONFIG_FILE}: eos_token: expected a token of {path}, got {named.get('eos_token')!r}")
        named = {name: token for name, token in named.items() if tokenizer.token_to_id(token) is not None}
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        if unmarked := [token for token in dict.fromkeys(named.values()) if token not in special]:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unmarked])
        return cls(tokenizer, named, _template(folder), ends=_ends(folder))

    @property
    def special_ids(self) -> dict[str, int | list[int] | None]:
        """Begin, end and padding as Transformers' configurations hold them; None for what the vocabulary lacks."""
        return {
            "bos_token_id": self.begin if "bos_token" in self._named else None,
            "eos_token_id": self.end if len(self.ends) == 1 else list(self.ends),
            "pad_token_id": self.padding if "pad_token" in self._named else None,
        }

    @property
    def unknown(self) -> int | None:
        """The token for what a vocabulary of characters lacks, if there is one."""
        return self._marked.token_to_id(self._named["unk_token"]) if "unk_token" in self._named else None

    def with_template(self, template: str, *, ends: Sequence[int] = ()) -> Self:
        """The same tokenizer with another chat template, and with `ends` as further tokens that end an answer."""
        other = copy(self)
        other.template, other.ends = template, tuple(dict.fromkeys([*self.ends, *ends]))
        return other

    def with_words(self, words: Sequence[str]) -> Self:
        """The same tokenizer with each of `words` as a token of its own, wherever it occurs."""
        whole = Tokenizer.from_str(self._marked.to_str())
        whole.add_tokens([AddedToken(word, normalized=False) for word in words])
        whole.post_processor = self._post_processor
        return type(self)(whole, self._named, self.template, ends=self.ends)

    def token_id(self, token: str) -> int:
        """The id of a token; InputError if the vocabulary lacks it."""
        found = self._marked.token_to_id(token)
        if found is None:
            raise InputError(f"expected a tokenizer with the token {token!r}, got one without it")
        return found

    def encode(self, text: str) -> list[int]:
        """The text without special tokens."""
        with _whole_words():
            return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many, on all cores."""
        with _whole_words():
            return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def cuts(self, texts: Sequence[str]) -> list[list[int]]:
        """For each text, how many of its characters the first token spells, the first two, and so on, up to whole characters.

        By the offsets of the encoding, since what decodes is not always the text: Metaspace writes spaces, NFC joins accents.
        """
        with _whole_words():
            encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        found = []
        for text, encoding in zip(texts, encodings, strict=True):
            starts = [start for start, _ in encoding.offsets[1:]] + [len(text)]
            # A character of several tokens is whole only with the last of them.
            found.append([min(end, start) for (_, end), start in zip(encoding.offsets, starts, strict=True)])
        return found

    def encode_document(self, text: str) -> list[int]:
        """The text as a whole document, between the begin and the end token."""
        return [self.begin, *self.encode(text), self.end]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of many, on all cores."""
        return [[self.begin, *ids, self.end] for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of the ids, without special tokens unless `special`."""
        return self._marked.decode(list(ids), skip_special_tokens=not special)

    def piece(self, token: int) -> str:
        """How the vocabulary spells a token, in its own alphabet."""
        return self._marked.id_to_token(token) or ""

    def to_json(self) -> str:
        """The tokenizer as a `tokenizer.json`, without what would add special tokens."""
        return self._marked.to_str()

    def spelled_bytes(self, ids: Sequence[int]) -> int:
        """Bytes of text that the ids of a byte-level vocabulary stand for: all bytes, unless some were unknown."""
        # Its alphabet writes each byte as one character.
        return sum(len(self.piece(token)) for token in ids)

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """A chat as text with its special tokens, up to where the assistant answers if `add_generation_prompt`.

        `tools` are OpenAI's descriptions of functions that the template may tell of.
        """
        self._refuse_special_tokens(messages)
        (text,) = render_chats(
            [messages],
            self._chat_template,
            special_tokens=self._named,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
        )
        return text

    def encode_prompt(self, messages: Sequence[ChatMessage], *, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids of a chat up to where the assistant answers."""
        rendered = self.render(messages, add_generation_prompt=True, tools=tools)
        with _whole_words():
            return self._marked.encode(rendered, add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[bool]]:
        """The ids of a chat and its loss mask, true for the assistant's text and the end of its turns."""
        (encoded,) = self.encode_chats([messages])
        return encoded

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[tuple[list[int], list[bool]]]:
        """`encode_chat` of many, on all cores."""
        for messages in chats:
            self._refuse_special_tokens(messages)
        rendered = render_with_spans(chats, self._chat_template, special_tokens=self._named, any_special=self._any_special)
        with _whole_words():
            encodings = self._marked.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            _without_suffix(messages, encoding.ids, loss_mask(encoding.offsets, spans))
            for messages, encoding, (_, spans) in zip(chats, encodings, rendered, strict=True)
        ]

    @property
    def _chat_template(self) -> str:
        if self.template is None:
            raise InputError("expected a chat template in tokenizer_config.json, got none; set chat_template on the stage")
        return self.template

    def _refuse_special_tokens(self, messages: Sequence[ChatMessage]) -> None:
        for message in messages:
            if found := self._any_special.search(message["content"] or ""):
                raise InputError(
                    f"the {message['role']}'s turn: expected text without special tokens, got {found.group()!r}, which would "
                    "end or begin a turn; remove it from the row"
                )

    def save(self, folder: Path) -> None:
        """Write the files that Transformers opens into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "additional_special_tokens": [token for token in self.special_tokens if token not in self._named.values()],
            **self._named,
            **({} if self.template is None else {"chat_template": self.template}),
            "clean_up_tokenization_spaces": False,  # or decoding loses spaces before punctuation
            "model_max_length": NO_LENGTH_LIMIT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        whole = Tokenizer.from_str(self._marked.to_str())
        whole.post_processor = self._post_processor
        write_text(folder / TOKENIZER_FILE, whole.to_str(pretty=True))
        write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _whole_words() -> Iterator[None]:
    """InputError where an expression of the tokenizer takes too long for a text, which its library reports as a panic."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3, which has no other name for it
            raise
        raise InputError(f"the tokenizer cannot split a text into words: {error}") from error


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, which neither cuts nor pads what it encodes; InputError if it is no such file."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception if it cannot read a file
        raise InputError(f"{path}: expected a tokenizer of the tokenizers library, got another file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_suffix(messages: Sequence[ChatMessage], ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    """Without what a template writes after the end of the last answer, such as a line break, which the loss does not count."""
    if messages[-1]["role"] != "assistant" or True not in mask:
        return ids, mask
    length = len(mask) - mask[::-1].index(True)
    return ids[:length], mask[:length]


def _named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that have a name, by Transformers' names."""
    found = _json(folder / SPECIAL_FILE) | {name: value for name, value in _json(folder / CONFIG_FILE).items() if value}
    tokens = {name: found[name] for name in NAMED if found.get(name)}
    return {name: token["content"] if isinstance(token, dict) else str(token) for name, token in tokens.items()}


def _template(folder: Path) -> str | None:
    """The chat template, in any of the places where versions of Transformers put it; of several named ones, the default."""
    if (path := folder / TEMPLATE_FILE).exists():
        return path.read_text(encoding="utf-8")
    found = _json(folder / CONFIG_FILE).get("chat_template")
    if isinstance(found, list):
        found = {item["name"]: item["template"] for item in found}.get("default")
    return None if found is None else str(found)


def _ends(folder: Path) -> list[int]:
    """The tokens that end an answer of the model in `folder`."""
    for name in GENERATION_FILES:
        found = _json(folder / name).get("eos_token_id")
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


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

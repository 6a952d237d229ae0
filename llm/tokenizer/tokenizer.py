"""`TextTokenizer`: documents and chats to token ids and back.

Its folder is one that Transformers opens with `AutoTokenizer`: `tokenizer.json`, and `tokenizer_config.json` with the chat
template inside. What looks like a special token inside a document or a message is plain text; only a chat template writes
control tokens. `llm.tokenizer.train_bpe` trains one. The tokenizers of other models open too: any `tokenizer.json`, with the
special tokens and the template beside it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from tokenizers import AddedToken, Encoding, Tokenizer

from llm.errors import InputError
from llm.files import write_text
from llm.tokenizer.answers import ChatRenderer, Part
from llm.tokenizer.chat_template import loss_mask
from llm.tokenizer.control_tokens import ControlTokens
from llm.tokenizer.files import (
    CONFIG_FILE,
    ENDS_OF_TURNS,
    PANIC,
    TOKENIZER_FILE,
    chat_template,
    ends_of_turns,
    model_ends,
    named_tokens,
    open_tokenizer,
)
from llm.tokenizer.messages import Chat, ChatMessage

NO_LENGTH_LIMIT = int(1e30)  # Transformers' value for "no limit"; the model has the limit
# Tokens that end a document in a model whose end token ends a turn of a chat: of GPT-2, Qwen, SmolLM and Phi; Llama 3; Gemma;
# Llama 2 and Mistral; DeepSeek.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")
_DERIVED = ("control", "_renderer", "document_begin", "document_end")  # computed when they are needed, from the template

__all__ = ["ChatMessage", "ChatPart", "TextTokenizer"]


class ChatPart(NamedTuple):
    """The beginning of a chat as tokens, with the answers that are learned in it."""

    stop: int  # messages
    answers: tuple[int, ...]  # which of them are learned
    ids: list[int]
    loss_mask: list[bool]  # true for the learned answers and the tokens that end them


class TextTokenizer:
    """Text to token ids and back.

    `end` is the end token, `ends` are all tokens that end an answer. Plain text is between `document_begin` and
    `document_end`, which a model of chats may have besides its end token. In a vocabulary without a begin token `begin` is the
    end token, so that each document follows the end of another; without a padding token `padding` is the end token, since
    neither attention nor the loss sees padding.
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
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1
        # In the order of their ids.
        self.special_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self.end = self.token_id(named["eos_token"])
        self.begin = self.token_id(named.get("bos_token", named["eos_token"]))
        self.padding = self.token_id(named.get("pad_token", named["eos_token"]))
        self.ends = tuple(dict.fromkeys([self.end, *ends]))
        self._learns_empty_think = False

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer in `folder`, which may be a checkpoint's; InputError if a file there cannot be used."""
        path = folder / TOKENIZER_FILE
        if not path.exists():
            raise InputError(f"{path}: expected a tokenizer of the tokenizers library, got no file")
        tokenizer = open_tokenizer(path)
        named = named_tokens(folder)
        if tokenizer.token_to_id(named.get("eos_token", "")) is None:
            raise InputError(f"{folder / CONFIG_FILE}: eos_token: expected a token of {path}, got {named.get('eos_token')!r}")
        named = {name: token for name, token in named.items() if tokenizer.token_to_id(token) is not None}
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        if unmarked := [token for token in dict.fromkeys(named.values()) if token not in special]:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unmarked])
        turns = (tokenizer.token_to_id(token) for token in ends_of_turns(folder))
        return cls(
            tokenizer, named, chat_template(folder), ends=[*model_ends(folder), *(end for end in turns if end is not None)]
        )

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
        return self._changed(template=template, ends=tuple(dict.fromkeys([*self.ends, *ends])))

    def with_empty_think_learned(self) -> Self:
        """The same tokenizer, for which an empty think block that the template writes before an answer is learned, too."""
        return self._changed(_learns_empty_think=True)

    def _changed(self, **attributes: Any) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update({name: value for name, value in vars(self).items() if name not in _DERIVED} | attributes)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which gets the files' content and derives the rest again."""
        return _restored, (type(self), self._whole().to_str(), self._named, self.template, self.ends, self._learns_empty_think)

    def _whole(self) -> Tokenizer:
        """A copy, with the part that adds special tokens."""
        whole = Tokenizer.from_str(self._marked.to_str())
        whole.post_processor = self._post_processor
        return whole

    def with_words(self, words: Sequence[str]) -> Self:
        """The same tokenizer with each of `words` as a token of its own, wherever it occurs."""
        whole = self._whole()
        whole.add_tokens([AddedToken(word, normalized=False) for word in words])
        return type(self)(whole, self._named, self.template, ends=self.ends)

    def within(self, rows: int) -> Self:
        """The same tokenizer without special tokens of an id of `rows` or above: an embedding of so many rows never saw
        them."""
        stored = json.loads(self._marked.to_str())
        stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < rows or not token["special"]]
        try:
            whole = Tokenizer.from_str(json.dumps(stored))
        except Exception as error:  # ids that the library numbered by itself
            raise InputError(f"expected special tokens that an embedding of {rows:,} rows can be without: {error}") from error
        whole.post_processor = self._post_processor
        return type(self)(whole, self._named, self.template, ends=[end for end in self.ends if end < rows])

    @cached_property
    def control(self) -> ControlTokens:
        """The tokens that only the chat template writes."""
        return ControlTokens(self._marked, self.template)

    @cached_property
    def _renderer(self) -> ChatRenderer:
        if self.template is None:
            raise InputError("expected a chat template in tokenizer_config.json, got none; set chat_template on the stage")
        ends = tuple(self._marked.id_to_token(end) or "" for end in self.ends)
        return ChatRenderer(self.template, self._named, self.control, ends, learns_empty_think=self._learns_empty_think)

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
            starts = [start for start, _ in encoding.offsets[1:]] + [len(text)] * bool(encoding.offsets)
            # A character of several tokens is whole only with the last of them.
            found.append([min(end, start) for (_, end), start in zip(encoding.offsets, starts, strict=True)])
        return found

    @cached_property
    def document_end(self) -> int:
        """The token that ends a document: the end token, unless that ends turns and the vocabulary has another for
        documents."""
        end = self._named["eos_token"]
        if end in DOCUMENT_ENDS or end not in (self.template or ""):  # a template that does not spell it means `eos_token`
            return self.end
        return next((self.token_id(token) for token in DOCUMENT_ENDS if token in self.special_tokens), self.end)

    @cached_property
    def document_begin(self) -> int:
        """The token that begins a document: the begin token, unless that begins turns, or else the one that ends documents."""
        begin = self._named.get("bos_token")
        if begin is None:
            return self.document_end
        if begin in (self.template or ""):
            said = ({"role": role, "content": "x"} for role in ("user", "assistant", "user"))
            with contextlib.suppress(InputError):  # a template that refuses a chat so simple
                if self.render(list(said)).count(begin) > 1:
                    return self.document_end
        return self.begin

    def encode_document(self, text: str) -> list[int]:
        """The text as a whole document, between the tokens that begin and end one."""
        return [self.document_begin, *self.encode(text), self.document_end]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of many, on all cores."""
        return [[self.document_begin, *ids, self.document_end] for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of the ids, without special tokens unless `special`."""
        with _whole_words():
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
        self,
        messages: Chat,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """A chat as text, up to where the assistant answers if `add_generation_prompt`.

        `tools` are OpenAI's descriptions of functions. `thinking` sets whether the answer begins with reasoning, in templates
        that leave it open.
        """
        return self.control.restored(self._rendered(messages, tools, thinking, add_generation_prompt))

    def encode_prompt(
        self, messages: Chat, *, tools: Sequence[Mapping[str, Any]] = (), thinking: bool | None = None
    ) -> list[int]:
        """The ids of a chat up to where the assistant answers; otherwise as `render`."""
        return self._encode_rendered([self._rendered(messages, tools, thinking, True)])[0].ids

    @property
    def has_thinking_switch(self) -> bool:
        """Whether the chat template reads `enable_thinking`."""
        return self._renderer.has_switch

    @property
    def writes_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return self._renderer.abilities.writes_tools

    def _rendered(
        self, messages: Chat, tools: Sequence[Mapping[str, Any]], thinking: bool | None, add_generation_prompt: bool
    ) -> str:
        chat = [{**messages[0], "tools": list(tools)}, *messages[1:]] if tools else messages
        return self._renderer.prompt(chat, thinking=thinking, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Chat) -> tuple[list[int], list[bool]]:
        """The ids of a chat up to its last answer, and its loss mask, true for the assistant's text and the end of its turns:
        of all turns that can be learned in one sequence with the last.
        """
        (parts,) = self.encode_parts([messages])
        if isinstance(parts, InputError):
            raise parts
        return parts[-1].ids, parts[-1].loss_mask

    def encode_parts(self, chats: Sequence[Chat]) -> list[list[ChatPart] | InputError]:
        """Of each chat, on all cores, the sequences that together have all of its answers, or why it is refused.

        There is one, with the whole chat, unless the template writes an earlier answer in another way than the last.
        """
        found = self._renderer.parts(chats)
        parts = [part for of_chat in found if not isinstance(of_chat, InputError) for part in of_chat]
        encodings = iter(self._encode_rendered([part.text for part in parts]))
        return [
            of_chat if isinstance(of_chat, InputError) else [_as_tokens(part, next(encodings)) for part in of_chat]
            for of_chat in found
        ]

    def _encode_rendered(self, texts: Sequence[str]) -> list[Encoding]:
        """Rendered chats, in which what stands in for typed characters is text."""
        plain = [self.control.unless_forged(text) for text in texts]
        with _whole_words():
            encoded = iter(self._marked.encode_batch([text for text in plain if text is not None], add_special_tokens=False))
            return [
                self.control.restoring.encode(text, add_special_tokens=False) if same is None else next(encoded)
                for text, same in zip(texts, plain, strict=True)
            ]

    def save(self, folder: Path) -> None:
        """Write the files that Transformers opens into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "additional_special_tokens": [token for token in self.special_tokens if token not in self._named.values()],
            **self._named,
            **self._ends_of_turns(),
            **({} if self.template is None else {"chat_template": self.template}),
            "clean_up_tokenization_spaces": False,  # or decoding loses spaces before punctuation
            "model_max_length": NO_LENGTH_LIMIT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        write_text(folder / TOKENIZER_FILE, self._whole().to_str(pretty=True))
        write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def _ends_of_turns(self) -> dict[str, Any]:
        """The tokens that end an answer beside the end token, with the names that Transformers gives to a model's own
        tokens."""
        tokens = [self._marked.id_to_token(end) or "" for end in self.ends[1:]]
        named = dict(zip(ENDS_OF_TURNS, tokens, strict=False))
        return {"extra_special_tokens": named} if named else {}


def _restored(
    made: type[TextTokenizer],
    stored: str,
    named: Mapping[str, str],
    template: str | None,
    ends: Sequence[int],
    learns_empty_think: bool,
) -> TextTokenizer:
    """A tokenizer that came from another process."""
    tokenizer = made(Tokenizer.from_str(stored), named, template, ends=ends)
    return tokenizer.with_empty_think_learned() if learns_empty_think else tokenizer


@contextlib.contextmanager
def _whole_words() -> Iterator[None]:
    """InputError where the tokenizer cannot encode a text: an expression takes too long, which its library reports as a panic,
    or there is no token for a word.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != PANIC:
            raise
        raise InputError(f"the tokenizer cannot split a text into words: {error}") from error


def _as_tokens(part: Part, encoding: Encoding) -> ChatPart:
    """Without what a template writes after the end of the last answer, such as a line break, which the loss does not count."""
    ids, mask = encoding.ids, loss_mask(encoding.offsets, part.spans)
    length = len(mask) - mask[::-1].index(True) if True in mask else len(mask)
    return ChatPart(part.stop, part.answers, ids[:length], mask[:length])

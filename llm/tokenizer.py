"""A byte-level BPE: training it, and `TextTokenizer`, which turns documents and chats into token ids and back.

The folder it lives in is one that Transformers opens with `AutoTokenizer`: `tokenizer.json`, and `tokenizer_config.json`
with the chat template inside. Special tokens have the first ids, in this order: begin, end, padding, the roles of a chat,
the recipe's own. A document that holds the characters of a special token holds them as plain text; only a chat's template
writes special tokens. What a tokenizer is worth is measured by `llm.tokenizer_report`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llm.chat_template import BEGIN, CHAT_TEMPLATE, END, PADDING, SPECIAL_TOKENS, learned_tokens, render_chats
from llm.errors import InputError
from llm.pretokenizers import WHOLE_WORDS_FIRST, PreTokenizerName, pre_tokenizer

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
NO_LENGTH_LIMIT = int(1e30)  # what Transformers takes for "none": how long rows may be is the model's business

Message = Mapping[str, str]  # role and content


class TextTokenizer:
    """Text to token ids and back."""

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, object]) -> None:
        self._marked = tokenizer  # reads the characters of a special token as that token: for rendered chats
        self._plain = Tokenizer.from_str(tokenizer.to_str())  # reads them as text: for everything else
        self._plain.encode_special_tokens = True
        self._template = str(config["chat_template"])
        self._named = {name: str(config[name]) for name in ("bos_token", "eos_token", "pad_token")}
        self._specials = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._any_special = re.compile("|".join(map(re.escape, self._specials)))
        self.begin = self.token_id(self._named["bos_token"])
        self.end = self.token_id(self._named["eos_token"])
        self.padding = self.token_id(self._named["pad_token"])

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer in `folder`, which may be a checkpoint's."""
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return cls(Tokenizer.from_file(str(folder / TOKENIZER_FILE)), config)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._marked.get_vocab_size()

    @property
    def special_tokens(self) -> list[str]:
        """All special tokens, in the order of their ids."""
        return list(self._specials)

    def token_id(self, token: str) -> int:
        """The id of a token that is in the vocabulary."""
        found = self._marked.token_to_id(token)
        if found is None:
            raise InputError(f"the tokenizer has no token {token!r}")
        return found

    def encode(self, text: str) -> list[int]:
        """The text alone, with no special token."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text alone, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_document(self, text: str) -> list[int]:
        """The text as a whole document, between the begin and the end token."""
        return [self.begin, *self.encode(text), self.end]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as a whole document, on all cores."""
        return [[self.begin, *ids, self.end] for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text that the ids spell; special tokens are left out unless asked for."""
        return self._marked.decode(list(ids), skip_special_tokens=not special)

    def spelled_bytes(self, ids: Sequence[int]) -> int:
        """How many bytes of text the ids stand for: of what was encoded all, unless it held something unknown."""
        # The byte alphabet writes each byte as one character.
        return sum(len(self._marked.id_to_token(token) or "") for token in ids)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """A chat as text, special tokens written out; the prompt for an answer ends where the assistant begins."""
        self._refuse_special_tokens(messages)
        ((text, _),) = render_chats(
            [messages], self._template, special_tokens=self._named, add_generation_prompt=add_generation_prompt
        )
        return text

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """A chat as ids, up to where the assistant is to answer."""
        return self._marked.encode(self.render(messages, add_generation_prompt=True), add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids of a chat, and which of them are learned: the assistant's text and the end of its turns."""
        (encoded,) = self.encode_chats([messages])
        return encoded

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """`encode_chat` of many, on all cores."""
        for messages in chats:
            self._refuse_special_tokens(messages)
        rendered = render_chats(chats, self._template, special_tokens=self._named)
        encodings = self._marked.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            (encoding.ids, learned_tokens(encoding.offsets, spans))
            for encoding, (_, spans) in zip(encodings, rendered, strict=True)
        ]

    def _refuse_special_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if found := self._any_special.search(message["content"]):
                raise InputError(
                    f"the {message['role']}'s turn holds {found.group()!r}, a special token of this tokenizer, which "
                    "would end or begin a turn; wants text without it"
                )

    def save(self, folder: Path) -> None:
        """Write the files that Transformers opens into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "additional_special_tokens": [token for token in self._specials if token not in self._named.values()],
            **self._named,
            "chat_template": self._template,
            "clean_up_tokenization_spaces": False,  # or decoding loses spaces before punctuation
            "model_max_length": NO_LENGTH_LIMIT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        _write(folder / TOKENIZER_FILE, self._marked.to_str(pretty=True))
        _write(folder / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    min_frequency: int,
    pre_tokenizer_name: PreTokenizerName,
    special_tokens: Sequence[str] = (),
    allow_smaller: bool = False,
) -> TextTokenizer:
    """A BPE of `vocab_size` tokens, special ones included, learned from `texts`; `special_tokens` come after the usual ones.

    A pair of tokens is merged only where it was seen `min_frequency` times. InputError where the text has too few such
    pairs for that vocabulary, unless `allow_smaller`. Source: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909
    """
    specials = [*SPECIAL_TOKENS, *special_tokens]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(pre_tokenizer_name)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_in_batches(texts), trainer=trainer)
    tokenizer.model.ignore_merges = pre_tokenizer_name in WHOLE_WORDS_FIRST
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, begin)]
    )
    if (found := tokenizer.get_vocab_size()) < vocab_size and not allow_smaller:
        raise InputError(
            f"a vocabulary of {vocab_size:,} is larger than the text supports: found {found:,} tokens, and after them no pair "
            f"that occurs {min_frequency} times; wants a smaller vocab_size or more text"
        )
    named = {"bos_token": BEGIN, "eos_token": END, "pad_token": PADDING}
    return TextTokenizer(tokenizer, {**named, "chat_template": CHAT_TEMPLATE})


def _in_batches(texts: Iterable[str], size: int = 1000) -> Iterator[list[str]]:
    """Lists of texts, because the trainer counts the words of one list on all cores."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write(path: Path, text: str) -> None:
    """Write under another name, then rename: a file under its final name is complete."""
    growing = path.with_name(path.name + ".growing")
    growing.write_text(text, encoding="utf-8")
    growing.replace(path)

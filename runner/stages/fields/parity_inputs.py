"""The inputs on which the kind `parity` compares systems: sentences, chats, and prompts to answer, from held-out data.

Rows that are too long are cut as in training; rows and sentences that cannot be used are skipped.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from llm.data.conversations import TextTemplate
from llm.data.turn import Turn
from llm.text.selection import evenly_spaced
from runner.input_files import InputFile
from runner.stage import Semantic, Spec
from runner.stages.fields.data_tables import RowTable, TextField
from runner.stages.fields.reading import Reading, form_of

if TYPE_CHECKING:
    from llm.tokenizer.tokenizer import TextTokenizer

CORPUS_BYTES = 2**20  # sample of a corpus's held-out documents that is cut into sentences
MAX_ROWS = 5000  # read from the files of a table
LONG_CHATS = 10  # chats of two turns, made of two chats

Chat = list[dict[str, str]]


class TextTable(Spec):
    """Files of held-out text."""

    files: Semantic[InputFile]
    """Files as in `sources` of a corpus."""
    read: Semantic[Reading | None] = None
    """How to read the files where they do not tell it: encoding, delimiter, sheet."""
    text: Semantic[TextField] = "text"
    """The field that holds the text, or a template over fields such as "{title}\\n{text}"."""


@dataclass(frozen=True)
class ParityInputs:
    """What is compared."""

    tokenizer: "TextTokenizer"
    sentences: list[str]
    chats: list[Chat]  # each ends with an answer
    prompts: list[list[int]]  # with room for an answer of max_new_tokens
    max_new_tokens: int

    @classmethod
    def choose(
        cls,
        tokenizer: "TextTokenizer",
        sentences: Sequence[str],
        rows: Sequence[Sequence[Turn]],
        *,
        positions: int,  # of the model
        prompts: int,  # most of them
        max_new_tokens: int,
    ) -> "ParityInputs":
        """Choose from sentences and rows; without any, `llm.export.parity.PROBES` stand in."""
        from llm.export.parity import PROBES

        max_new_tokens = min(max_new_tokens, positions // 2)
        room = positions - max_new_tokens
        usable = [text for text in sentences if not tokenizer.control.any.search(text)]
        texts = usable or list(PROBES)
        if tokenizer.template is None:
            halves = [tokenizer.encode_document(text)[:-1] for text in evenly_spaced(texts, prompts)]
            return cls(tokenizer, usable, [], [ids[: min(1 + len(ids) // 2, room)] for ids in halves], max_new_tokens)
        chats = [chat for turns in evenly_spaced(rows, prompts) if (chat := _fitted(turns, tokenizer, room))]
        if not chats:
            pairs = [_turns(question, answer) for question, answer in zip(texts, texts[1:] + texts[:1], strict=True)]
            chats = [chat for turns in evenly_spaced(pairs, prompts) if (chat := _fitted(turns, tokenizer, room))]
        long_chats = [first + second for first, second in pairwise(chats)][:LONG_CHATS]
        with_system = [[{"role": "system", "content": "Answer briefly."}, *chat] for chat in chats[:1]]
        all_chats = chats + [chat for chat in long_chats + with_system if _is_accepted(chat, tokenizer)]
        return cls(tokenizer, usable, all_chats, [tokenizer.encode_prompt(chat[:-1]) for chat in chats], max_new_tokens)


def read_sentences(corpora: Iterable[Path], tables: Iterable[TextTable]) -> Iterator[str]:
    """Sentences of the held-out documents of corpora and of files."""
    from llm.data.chat_dataset import read_turns
    from llm.errors import InputError
    from llm.export.parity import sentences
    from llm.text.documents import sample_documents

    for documents in corpora:
        yield from sentences(document.text for document in sample_documents(documents, CORPUS_BYTES))
    for table in tables:
        rows = islice(read_turns(table.files.fetched(), TextTemplate(table.text, form_of(table.read))), MAX_ROWS)
        yield from sentences(turns[-1].content for _, turns, *_ in rows if not isinstance(turns, InputError))


def read_rows(tables: Iterable[RowTable]) -> Iterator[Sequence[Turn]]:
    """The rows of tables that end with an answer, as turns; InputError at a bad row of a table that does not skip it."""
    from llm.data.chat_dataset import read_turns
    from llm.errors import InputError

    for table in tables:
        for _, turns, *_ in islice(read_turns(table.files.fetched(), table.template), MAX_ROWS):
            if isinstance(turns, InputError):
                if table.on_bad_row == "fail":
                    raise turns
            elif turns[-1].role == "assistant":
                yield turns


def _turns(question: str, answer: str) -> list[Turn]:
    return [Turn("user", ("", question, "")), Turn("assistant", (answer,))]


def _fitted(turns: Sequence[Turn], tokenizer: "TextTokenizer", room: int) -> Chat:
    """The chat with a prompt of at most `room` tokens, cut as in training; empty if it cannot be cut to that."""
    from llm.data.truncation import fit
    from llm.errors import InputError

    try:
        stream = fit([*turns[:-1], Turn("assistant", ("",))], tokenizer, positions=room - 1)
    except InputError:
        return []
    chat = [*stream.messages[:-1], turns[-1].message]
    fits = not stream.cut_response and _is_accepted(chat, tokenizer) and len(tokenizer.encode_prompt(chat[:-1])) <= room
    return chat if fits else []


def _is_accepted(chat: Chat, tokenizer: "TextTokenizer") -> bool:
    """Whether the template accepts the chat, and no text of it looks like a control token, which other systems take it for."""
    from llm.errors import InputError

    try:
        tokenizer.encode_chat(chat)
    except InputError:
        return False
    return not any(tokenizer.control.any.search(message["content"]) for message in chat)

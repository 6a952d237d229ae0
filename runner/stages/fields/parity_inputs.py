"""What a model is compared by: sentences, chats, and prompts to answer, from what a recipe holds out.

Rows that are too long are cut as in training; rows and sentences that cannot be used are passed over. For the kind `parity`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import field_validator

from llm.data.conversations import TextTemplate, Turn
from llm.text.selection import evenly_spaced
from llm.text.templates import split_text
from runner.input_files import InputFile
from runner.stage import Semantic, Spec
from runner.stages.fields.data_tables import RowTable

if TYPE_CHECKING:
    from llm.tokenizer.tokenizer import TextTokenizer

CORPUS_BYTES = 2**20  # of a corpus's held-out documents that are cut into sentences
MOST_ROWS = 5000  # of the files of a table that sentences and prompts are chosen from
TURNS = 10  # chats of several turns

Chat = list[dict[str, str]]


class TextTable(Spec):
    """Files of held-out text."""

    files: Semantic[InputFile]
    """Path or glob: .jsonl, .txt or .csv (also .gz, .zst), or .parquet."""
    text: Semantic[str] = "text"
    """The field that holds the text, or a template over fields such as "{title}\\n{text}"."""

    @field_validator("text")
    @classmethod
    def _is_field_or_template(cls, text: str) -> str:
        split_text(text)
        return text


@dataclass(frozen=True)
class Material:
    """What is compared."""

    tokenizer: "TextTokenizer"
    sentences: list[str]
    chats: list[Chat]  # each ends with an answer
    prompts: list[list[int]]  # with room for an answer of max_new_tokens
    max_new_tokens: int

    @classmethod
    def of(
        cls,
        tokenizer: "TextTokenizer",
        sentences: Sequence[str],
        rows: Sequence[Sequence[Turn]],
        *,
        positions: int,  # of the model
        wanted: int,  # prompts
        max_new_tokens: int,
    ) -> "Material":
        """Choose from sentences and rows; where there is none, those take part that always do."""
        from llm.export.parity import PROBES

        max_new_tokens = min(max_new_tokens, positions // 2)
        room = positions - max_new_tokens
        special = tokenizer.special_tokens
        found = [text for text in sentences if not any(token in text for token in special)]
        texts = found or list(PROBES)
        if tokenizer.template is None:
            halves = [tokenizer.encode_document(text)[:-1] for text in evenly_spaced(texts, wanted)]
            return cls(tokenizer, found, [], [ids[: min(1 + len(ids) // 2, room)] for ids in halves], max_new_tokens)
        chats = [chat for turns in evenly_spaced(rows, wanted) if (chat := _fitted(turns, tokenizer, room))]
        if not chats:
            pairs = [_row(question, answer) for question, answer in zip(texts, texts[1:] + texts[:1], strict=True)]
            chats = [chat for turns in evenly_spaced(pairs, wanted) if (chat := _fitted(turns, tokenizer, room))]
        several = [first + second for first, second in pairwise(chats)][:TURNS]
        guided = [[{"role": "system", "content": "Answer briefly."}, *chat] for chat in chats[:1]]
        rendered = chats + [chat for chat in several + guided if _is_taken(chat, tokenizer)]
        return cls(tokenizer, found, rendered, [tokenizer.encode_prompt(chat[:-1]) for chat in chats], max_new_tokens)


def texts_of(corpora: Iterable[Path], tables: Iterable[TextTable]) -> Iterator[str]:
    """Sentences of the held-out documents of corpora and of files."""
    from llm.data.chat_dataset import read_turns
    from llm.errors import InputError
    from llm.export.parity import sentences
    from llm.text.documents import sample_documents

    for documents in corpora:
        yield from sentences(document.text for document in sample_documents(documents, CORPUS_BYTES))
    for table in tables:
        rows = islice(read_turns(table.files.fetched(), TextTemplate(table.text)), MOST_ROWS)
        yield from sentences(turns[-1].content for _, turns, _ in rows if not isinstance(turns, InputError))


def rows_of(tables: Iterable[RowTable]) -> Iterator[Sequence[Turn]]:
    """The rows of tables as turns, those that end with an answer; an InputError where a table does not pass over a bad one."""
    from llm.data.chat_dataset import read_turns
    from llm.errors import InputError

    for table in tables:
        for _, turns, _ in islice(read_turns(table.files.fetched(), table.template), MOST_ROWS):
            if isinstance(turns, InputError):
                if table.on_bad_row == "fail":
                    raise turns
            elif turns[-1].role == "assistant":
                yield turns


def _row(question: str, answer: str) -> list[Turn]:
    return [Turn("user", ("", question, "")), Turn("assistant", (answer,))]


def _fitted(turns: Sequence[Turn], tokenizer: "TextTokenizer", room: int) -> Chat:
    """The chat with a prompt of at most `room` tokens, cut as in training; empty where that cannot be."""
    from llm.data.truncation import fit
    from llm.errors import InputError

    try:
        stream = fit([*turns[:-1], Turn("assistant", ("",))], tokenizer, positions=room - 1)
    except InputError:
        return []
    chat = [*stream.messages[:-1], turns[-1].message]
    fits = not stream.cut_response and _is_taken(chat, tokenizer) and len(tokenizer.encode_prompt(chat[:-1])) <= room
    return chat if fits else []


def _is_taken(chat: Chat, tokenizer: "TextTokenizer") -> bool:
    """Whether the template takes the chat, and none of its texts holds a special token."""
    from llm.errors import InputError

    try:
        tokenizer.encode_chat(chat)
    except InputError:
        return False
    return True

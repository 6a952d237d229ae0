"""Tokens of `pack` stages that a training learns from: their tokenizer, the held-out part, and what is replayed beside
them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from runner.artifacts import Tokenizer, Tokens
from runner.stage import Context, Ref, Semantic, Spec

if TYPE_CHECKING:
    from llm.data.batch import RowSource
    from llm.training.validation import Validation


class ReplayTable(Spec):
    """Tokens with a share of the rows of a training, so that what they teach is not forgotten."""

    tokens: Semantic[Ref[Tokens]]
    """Tokens of a `pack` stage with the same tokenizer."""
    share: Semantic[Annotated[float, Field(gt=0, lt=1)]]
    """Share of the training's rows, spread evenly over its steps."""


def check_tokenizer(context: Context, tokens: Ref[Tokens], wanted: Tokenizer, *, place: str, owner: str) -> None:
    """InputError unless `tokens` is packed with the tokenizer `wanted`, that of the stage `owner`."""
    from llm.errors import InputError

    if context.open(tokens).tokenizer.model.read_bytes() != wanted.model.read_bytes():
        raise InputError(f"{place}: expected the tokenizer of {owner!r}, got another one in {str(tokens)!r}")


def held_out_text(tokens: Tokens, length: int, *, most: int, every: int | None) -> "Validation | None":
    """The held-out documents as rows of `length`; None if there are none."""
    from llm.data.token_rows import TokenRows
    from llm.training.validation import Validation

    rows = TokenRows(tokens.validation, context=length, seed=None)
    return Validation(rows, sources=rows.sources, tokens=most, every=every) if rows.rows_per_epoch else None


def replayed(
    context: Context, rows: "RowSource", tables: Sequence[ReplayTable], *, seed: int, tokenizer: Tokenizer
) -> "RowSource":
    """`rows` with the rows of `tables` among them, which have the same length and the same `tokenizer`."""
    from llm.data.mixture import mixed
    from llm.data.token_rows import TokenRows

    others = []
    for number, table in enumerate(tables):
        check_tokenizer(context, table.tokens, tokenizer, place=f"mix[{number}].tokens", owner="tokens")
        others.append((TokenRows(context.open(table.tokens).train, context=rows.context, seed=seed), table.share))
    return mixed(rows, others)

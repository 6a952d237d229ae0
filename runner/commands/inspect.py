"""`run inspect RECIPE STAGE`: samples of what a stage learns from, as it will see them."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from runner.artifacts import Adapter, Checkpoint, Tokenizer, Tokens
from runner.errors import RecipeError
from runner.options import add_recipe_argument, add_stage_argument, recipe_of, store_of
from runner.planning.plan import Plan
from runner.stages.corpus import MakeCorpus
from runner.stages.fields.chat_training import PackedTraining
from runner.stages.lora import TrainAdapter
from runner.stages.pack import Pack
from runner.stages.pretrain import Pretraining
from runner.stages.tokenizer import TrainTokenizer
from runner.terminal import console

if TYPE_CHECKING:
    from llm.data.turn import Turn
    from llm.tokenizer.tokenizer import ChatPart, TextTokenizer

HEADING, QUIET, GOOD, BAD = "bold", "dim", "green", "red"
PIECES = ("black on bright_cyan", "black on bright_yellow")  # adjacent tokens
LEARNED, MASKED = "black on bright_green", "dim"
SHOWN = 600  # characters of a text
SENTENCES = 200  # that are encoded and decoded


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_stage_argument(sub)
    sub.add_argument("--count", type=int, default=5, metavar="N", help="samples of each kind (default: 5)")


def main(options: argparse.Namespace) -> int:
    """Shows rows before and after cleaning, tokens, packed rows, or chats with their loss mask."""
    from llm.errors import InputError

    recipe = recipe_of(options)
    if options.count < 1:
        raise RecipeError(f"--count: expected at least 1, got {options.count}")
    out = console(sys.stdout, soft_wrap=True)
    try:
        for line in inspect(Plan(recipe, store_of(options)), options.stage, count=options.count):
            out.print(line)
    except InputError as error:
        raise RecipeError(f"{options.stage}: {error}") from error
    return 0


def inspect(plan: Plan, name: str, *, count: int) -> Iterator[Text]:
    """Lines about the stage `name`, with `count` samples; RecipeError if a stage that it needs is not finished."""
    name = plan.named(name).name
    match plan.entries[name].stage:
        case MakeCorpus() as stage:
            yield from _corpus(stage, count)
        case TrainTokenizer() as stage:
            yield from _tokenizer(_folder(plan, name), _folder(plan, stage.corpus), count)
        case Pack():
            yield from _packed(_folder(plan, name), count, seed=0)
        case Pretraining() as stage:
            yield from _packed(_folder(plan, stage.tokens), count, seed=stage.seed)
        case TrainAdapter(tokens=str() as tokens) as stage:
            yield from _packed(_folder(plan, tokens), count, seed=stage.seed)
        case PackedTraining() as stage:
            yield from _chats(stage, _tokenizer_above(plan, name), count)
        case stage:
            kinds = "corpus, tokenizer, pack, pretrain, trunk, sft, lora, dpo"
            raise RecipeError(f"{name}: expected a stage that learns or prepares ({kinds}), but its kind is {stage.kind!r}")


def _folder(plan: Plan, name: str) -> Path:
    entry = plan.entries[name]
    if entry.path is None:
        raise RecipeError(f"{name}: expected a finished stage, but its state is {entry.state!r}; run the recipe first")
    return entry.path


def _tokenizer_above(plan: Plan, name: str) -> "TextTokenizer":
    """The tokenizer that a training on chats uses, from the nearest finished stage above it."""
    from llm.tokenizer.tokenizer import TextTokenizer

    above = plan.above(name)
    for entry in reversed([entry for entry in plan if entry.name in above and entry.path is not None]):
        match entry.stage.makes(entry.path):  # type: ignore[arg-type]  # filtered above
            case Checkpoint() | Tokenizer() as artifact:
                return TextTokenizer.load(artifact.folder)
            case Tokens() as artifact:
                return TextTokenizer.load(artifact.tokenizer.folder)
            case Adapter():
                continue
    raise RecipeError(f"{name}: expected a finished tokenizer above it, got none; run the recipe up to there first")


def _corpus(stage: MakeCorpus, count: int) -> Iterator[Text]:
    from llm.errors import InputError
    from llm.text.cleaning import drop_reason, prepared
    from llm.text.sources import rows_of
    from llm.text.templates import split_text, text_of

    for source in stage.local_sources():
        yield Text(f"{source.name}: the first {count} rows", style=HEADING)
        parts = split_text(source.text)
        for row in islice(rows_of(source), count):
            place = (f"{row.at}  ", QUIET)
            try:
                fields = row.fields()
                raw = text_of(fields, parts)
            except InputError as error:
                yield Text.assemble(place, (f"cannot be used: {error}", BAD))
                continue
            if not all(fields.get(field) == value for field, value in source.where.items()):
                yield Text.assemble(place, ("dropped: filtered by `where`", BAD))
                continue
            text = prepared(raw, rules=stage.rules())
            reason = drop_reason(text, text.encode(), rules=stage.rules())
            verdict = (f"dropped: {reason}", BAD) if reason else ("kept", GOOD)
            yield Text.assemble(place, verdict, (f"  {len(text):,} characters", QUIET))
            if raw != text:
                yield Text.assemble(("  before  ", QUIET), _shown(raw))
            yield Text.assemble(("  after   " if raw != text else "          ", QUIET), _shown(text))
    if hubs := [spec.hub for spec in stage.sources if spec.hub is not None]:
        yield Text(f"not shown, because they are on the Hub: {', '.join(hubs)}", style=QUIET)
    yield Text("duplicates are found only in the whole corpus; its record counts them", style=QUIET)


def _tokenizer(folder: Path, corpus: Path, count: int) -> Iterator[Text]:
    from llm.text.documents import sample_documents
    from llm.tokenizer.report import sample_sentences
    from llm.tokenizer.tokenizer import TextTokenizer
    from runner.artifacts import Corpus

    tokenizer = TextTokenizer.load(folder)
    yield Text(f"{tokenizer.vocab_size:,} tokens; special: {' '.join(tokenizer.special_tokens)}", style=HEADING)
    step = max(1, tokenizer.vocab_size // (8 * count))
    words = Text("every ", style=QUIET).append(f"{step}th token:  ", style=QUIET)
    yield _joined(words, (_spelled(tokenizer, [token]) for token in range(0, tokenizer.vocab_size, step)))
    sentences = sample_sentences(list(sample_documents(Corpus(corpus).validation, 200_000)), SENTENCES)
    yield Text("held-out sentences, a colour per token", style=HEADING)
    encoded = tokenizer.encode_batch(sentences)
    for ids in encoded[:count]:
        yield _joined(Text(f"{len(ids):4} tokens  ", style=QUIET), _characters(tokenizer, ids))
    failed = [(sentence, ids) for sentence, ids in zip(sentences, encoded, strict=True) if tokenizer.decode(ids) != sentence]
    yield Text(f"{len(failed)} of {len(sentences)} sentences change when encoded and decoded", style=BAD if failed else GOOD)
    for sentence, ids in failed[:count]:
        yield Text.assemble("  ", _shown(sentence), (" -> ", QUIET), _shown(tokenizer.decode(ids)))


def _packed(folder: Path, count: int, *, seed: int) -> Iterator[Text]:
    from llm.data.token_rows import TokenRows
    from llm.tokenizer.tokenizer import TextTokenizer

    tokens = Tokens(folder)
    tokenizer = TextTokenizer.load(tokens.tokenizer.folder)
    rows = TokenRows(tokens.train, seed=seed)
    about = f"{rows.rows_per_epoch:,} rows of {rows.context} tokens an epoch; the first, a colour per document"
    yield Text(about, style=HEADING)
    for index in range(min(count, rows.rows_per_epoch)):
        row = rows.row(index)
        line = Text(f"row {index}  ", style=QUIET)
        numbers = row.documents.tolist()
        for document in dict.fromkeys(numbers):
            ids = [int(token) for token, number in zip(row.tokens, numbers, strict=True) if number == document]
            if document < 0:
                line.append(f"[{len(ids)} padding]", style=QUIET)
                continue
            line.append(_visible(tokenizer.decode(ids, special=True)), style=PIECES[document % 2])
            line.append("|", style=HEADING)
        yield line


def _chats(stage: PackedTraining, tokenizer: "TextTokenizer", count: int) -> Iterator[Text]:
    from llm.data.chat_dataset import read_chats
    from llm.data.chat_parts import fitted_groups, with_reasoning
    from llm.errors import InputError

    if stage.learn_empty_think:
        tokenizer = tokenizer.with_empty_think_learned()
    positions = stage.context or 1 << 20
    yield Text.assemble(("with the chat template: ", HEADING), ("[in the loss]", LEARNED), " ", ("masked", MASKED))
    if stage.context is None:
        yield Text("shown in full; training cuts chats to the model's context", style=QUIET)
    for table in stage.tables()[0]:
        yield Text(f"{table.files}: the first {count} rows", style=HEADING)
        for place, chats, _ in islice(read_chats(table.files.fetched(), table.template), count):
            try:
                if isinstance(chats, InputError):
                    raise chats
                chats = [with_reasoning(turns, stage.reasoning) for turns in chats]
                encoded = [_parts(tokenizer, turns) for turns in chats]
                # The two chats of a preference are fitted together; those of several labels are rows of their own.
                pairs = (
                    [(chats, encoded)] if stage.kind == "dpo" else [([c], [e]) for c, e in zip(chats, encoded, strict=True)]
                )
                groups = [group for pair in pairs for group in fitted_groups(*pair, tokenizer, positions=positions)]
            except InputError as error:
                yield Text(f"cannot be used: {error}", style=BAD)
                continue
            for number, streams in enumerate(groups, start=1):
                part = f"part {number} of {len(groups)}, " if len(groups) > 1 else ""
                for stream, name in zip(streams, ("chosen, ", "rejected, ") if len(streams) > 1 else (part,), strict=True):
                    cut = (", prompt cut" if stream.cut_prompt else "") + (", answer cut" if stream.cut_response else "")
                    yield Text(f"{Path(place).name}  {name}{len(stream.ids)} tokens{cut}", style=QUIET)
                    yield _joined(Text("  "), _runs(tokenizer, stream.ids, stream.loss_mask))


def _parts(tokenizer: "TextTokenizer", turns: "Sequence[Turn]") -> "list[ChatPart]":
    from llm.errors import InputError

    (parts,) = tokenizer.encode_parts([[turn.message for turn in turns]])
    if isinstance(parts, InputError):
        raise parts
    return parts


def _runs(tokenizer: "TextTokenizer", ids: Sequence[int], loss_mask: Sequence[bool]) -> Iterator[Text]:
    """Runs of tokens that are all in the loss, or all masked; brackets mark the former where there are no colours."""
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or loss_mask[stop] != loss_mask[start]:
            text = _visible(tokenizer.decode(ids[start:stop], special=True))
            yield Text(f"[{text}]", style=LEARNED) if loss_mask[start] else Text(text, style=MASKED)
            start = stop


def _characters(tokenizer: "TextTokenizer", ids: Sequence[int]) -> Iterator[Text]:
    """The tokens of a text; tokens that make up one character are shown as one piece, followed by their number."""
    start = piece = 0
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:stop], special=True)
        if text.endswith("\ufffd") and stop < len(ids):
            continue
        number = f"({stop - start})" if stop - start > 1 else ""
        yield Text.assemble((_visible(text), PIECES[piece % 2]), (number, QUIET), "|")
        start, piece = stop, piece + 1


def _spelled(tokenizer: "TextTokenizer", ids: Sequence[int]) -> Text:
    """A token as text, or its number of bytes if it is only part of a character."""
    text = tokenizer.decode(ids, special=True)
    if "\ufffd" in text:
        return Text(f"<{tokenizer.spelled_bytes(ids)} bytes> ", style=QUIET)
    return Text(json.dumps(text, ensure_ascii=False) + " ")


def _joined(line: Text, parts: Iterable[Text]) -> Text:
    for part in parts:
        line.append_text(part)
    return line


def _visible(text: str) -> str:
    return text.replace("\n", "↵")


def _shown(text: str) -> Text:
    """A text on one line, at most SHOWN characters."""
    return Text(_visible(text[:SHOWN]) + ("…" if len(text) > SHOWN else ""))

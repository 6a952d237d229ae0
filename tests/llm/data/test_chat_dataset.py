"""Chats as packed rows: targets, truncation, and files."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llm.data.batch import IGNORE, PackedRow
from llm.data.chat_dataset import write_rows
from llm.data.chat_parts import Table
from llm.data.conversations import Template
from llm.data.packing import PackedRows
from llm.data.truncation import fit, fit_all, windows
from llm.data.turn import Turn
from llm.errors import InputError, Interrupted
from llm.tokenizer.chat_template import PLAIN_TEMPLATE
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe

WORDS = "a chat about the heart, the lungs and the liver; 心脏和肺以及肝脏。 "
TOKENIZER = train_bpe([WORDS * 50], 320, min_frequency=2, pre_tokenizer_name="gpt-2", allow_smaller=True)


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., tuple[PackedRows, dict[str, Any]]]:
    """Packs rows, given as a list or as the lines of a file, and opens what was packed."""

    def make(*tables: list[dict[str, Any]] | str, context: int = 64, seed: int | None = None, **options: Any) -> Any:
        files = []
        for number, rows in enumerate(tables):
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            files.append(tmp_path / f"rows-{number}.jsonl")
            files[-1].write_text(text, encoding="utf-8")
        template = options.pop("template", Template())
        folder = tmp_path / options.pop("name", "packed")
        longest_row, follow_lengths = options.pop("longest_row", None), options.pop("follow_lengths", False)
        statistics = write_rows(
            folder,
            [Table((file,), template, **options) for file in files],
            tokenizer=TOKENIZER,
            context=context,
            follow_lengths=follow_lengths,
            longest_row=longest_row,
            report=lambda **values: None,
            should_stop=lambda: False,
        )
        return PackedRows(folder, seed=seed), statistics

    return make


def pair(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}


def learned_text(row: PackedRow, document: int) -> str:
    chosen = (row.documents == document) & (row.targets != IGNORE)
    return TOKENIZER.decode(row.targets[chosen].tolist(), special=True)


def test_the_targets_are_exactly_the_answers_and_their_ends(pack: Any) -> None:
    turns = [("user", "the heart?"), ("assistant", "a heart"), ("user", "肺"), ("assistant", "the 肺。")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows, statistics = pack([{"chat": messages}], template=Template(messages="chat"))
    row = rows.row(0)
    assert learned_text(row, 0) == "a heart<|end|>the 肺。<|end|>"
    assert statistics["learned_tokens"] == (row.targets != IGNORE).sum()


def test_a_target_is_the_next_token_of_the_same_chat_and_padding_has_none(pack: Any) -> None:
    rows, _ = pack([pair("the heart", "a"), pair("the lungs and the liver", "chat")])
    row = rows.row(0)
    real = row.documents >= 0
    assert set(row.documents[real].tolist()) == {0, 1}
    for document in (0, 1):
        tokens, targets = row.tokens[row.documents == document], row.targets[row.documents == document]
        assert tokens[0] == TOKENIZER.begin
        assert targets[-1] == TOKENIZER.end
        taught = targets[:-1] != IGNORE
        assert np.array_equal(targets[:-1][taught], tokens[1:][taught])
    assert (row.targets[~real] == IGNORE).all()
    assert (row.tokens[~real] == TOKENIZER.padding).all()
    assert len(row.tokens) == rows.context == 64


def test_rows_come_in_another_order_each_epoch_and_are_a_function_of_their_index(pack: Any, tmp_path: Path) -> None:
    rows, _ = pack([pair("the heart " * 3, f"the liver {n}") for n in range(40)], context=32, seed=5)
    count = rows.rows_per_epoch
    epochs = [[rows.row(epoch * count + place).tokens.tobytes() for place in range(count)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    again = PackedRows(tmp_path / "packed", seed=5)
    assert again.row(count + 2).tokens.tobytes() == epochs[1][2]  # without having asked for those before
    other = PackedRows(tmp_path / "packed", seed=6)
    assert [other.row(place).tokens.tobytes() for place in range(count)] != epochs[0]


def test_a_prompt_too_long_loses_the_end_of_what_was_substituted_and_nothing_else() -> None:
    turns = Template("Which organ?\n{text}\nSay it.", "the liver").turns({"text": "heart lungs " * 100})
    stream = fit(turns, TOKENIZER, positions=48)
    prompt, response = (message["content"] for message in stream.messages)
    assert prompt.startswith("Which organ?\nheart lungs heart")
    assert prompt.endswith("\nSay it.")
    assert response == "the liver"
    assert 46 <= len(stream.ids) <= 49  # the room is used
    assert stream.ids[-1] == TOKENIZER.end
    assert (stream.cut_prompt, stream.cut_response) == (True, False)
    assert TOKENIZER.encode_chat(stream.messages)[0] == stream.ids  # inference would see the same


def test_of_several_substituted_texts_the_longest_is_cut_first() -> None:
    turns = Template("{title}: {text}", "liver").turns({"title": "the lungs", "text": "heart " * 100})
    prompt = fit(turns, TOKENIZER, positions=40).messages[0]["content"]
    assert prompt.startswith("the lungs: heart heart")


def test_a_response_too_long_by_itself_keeps_part_of_its_prompt_and_lacks_the_end() -> None:
    turns = Template().turns(pair("heart " * 40, "liver " * 100))
    stream = fit(turns, TOKENIZER, positions=48)
    assert len(stream.ids) == 49
    assert TOKENIZER.end not in stream.ids
    assert stream.messages[0]["content"].startswith("heart heart")
    assert 49 // 3 < sum(stream.loss_mask) < 49 * 2 // 3
    assert (stream.cut_prompt, stream.cut_response) == (True, True)


def exchanges(*pairs: tuple[str, str]) -> list[Turn]:
    return [turn for asked, said in pairs for turn in (Turn("user", ("", asked, "")), Turn("assistant", (said,)))]


def test_a_chat_too_long_keeps_its_first_turns_whole_and_loses_the_later_ones(pack: Any) -> None:
    turns = exchanges(*[(f"the heart and the lungs {n}?", f"the liver {n}") for n in range(6)])
    whole = TOKENIZER.encode_chat([turn.message for turn in turns])
    for positions in range(16, len(whole[0]) - 1):
        (stream,) = fit_all([turns], [whole], TOKENIZER, positions=positions)
        kept = len(stream.messages)
        assert kept % 2 == 0 and stream.cut_turns == 12 - kept > 0
        if not stream.cut_prompt:
            assert stream.messages == [turn.message for turn in turns[:kept]]
            assert stream.ids[-1] == TOKENIZER.end
            assert len(TOKENIZER.encode_chat([turn.message for turn in turns[: kept + 2]])[0]) > positions + 1
        else:  # the first exchange alone is too long
            assert kept == 2
    chat = [{"role": turn.role, "content": turn.content} for turn in turns]
    _, statistics = pack([{"chat": chat}, {"chat": chat[:2]}], context=48, template=Template(messages="chat"))
    assert (statistics["cut_turns"], statistics["truncated"], statistics["rows"]) == (1, 1, 2)
    assert statistics["cut"].startswith("warning: 1 of 2 rows (50%) are longer than 48 positions and were cut, by ")


def metaspace_tokenizer() -> TextTokenizer:
    """A tokenizer that does not decode to what it encoded: NFC joins accents, Metaspace turns every space into its mark."""
    model = models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[], unk_token=None)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(["der herz schlägt und die lunge atmet, café"] * 5, trainer)
    return TextTokenizer(tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}, PLAIN_TEMPLATE)


def test_a_prompt_is_cut_where_its_tokens_end_also_if_they_do_not_decode_to_it() -> None:
    tokenizer = metaspace_tokenizer()
    text = "Die Lunge atmet, Cafe\u0301  und das Herz schla\u0308gt " * 20
    stream = fit(Template().turns(pair(text, "die lunge")), tokenizer, positions=60)
    kept = stream.messages[0]["content"]
    assert text.startswith(kept) and len(kept) > 30
    assert 58 <= len(stream.ids) <= 61 and stream.cut_prompt and not stream.cut_response
    for count in range(1, 40):  # no accent without its letter, no piece of a character
        assert text.startswith(text[: tokenizer.cuts([text])[0][count]])
    byte_level = TOKENIZER.cuts(["心脏🫀 the"])[0]
    assert byte_level == sorted(byte_level) and byte_level[-1] == 7
    assert set(byte_level) <= set(range(8))


TEXTS = st.text(alphabet=st.sampled_from("the heart,肺心🫀é\n"), min_size=1, max_size=80)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.integers(min_value=8, max_value=60))
@settings(deadline=None)
def test_a_fitted_chat_fits_and_loses_answers_only_if_they_are_too_long_by_themselves(
    pairs: list[tuple[str, str]], positions: int
) -> None:
    turns = exchanges(*pairs)
    stream = fit(turns, TOKENIZER, positions=positions)
    assert len(stream.ids) == len(stream.loss_mask) <= positions + 1
    for turn, message in zip(turns, stream.messages, strict=True):
        assert turn.content.startswith(message["content"])
    alone = [turn.with_substituted(iter([""])) for turn in turns]
    fits_alone = len(TOKENIZER.encode_chat([turn.message for turn in alone])[0]) <= positions + 1
    assert stream.cut_response == (not fits_alone)


def test_cut_rows_are_counted_and_rows_without_targets_are_dropped(pack: Any) -> None:
    table = [pair("heart " * 50, "liver"), pair("q", "liver " * 50), pair("q", "a")]
    _, statistics = pack(table, context=24)
    assert statistics["cut_prompts"] == 1
    assert statistics["cut_responses"] == 1
    assert statistics["dropped"] == 0
    long_question = Template("the heart and the liver " * 20 + "{prompt}")
    with pytest.raises(InputError, match=r'got none: .*"dropped": 3'):
        pack(table, context=24, template=long_question)


def test_a_weight_is_passes_per_epoch_and_a_fraction_chooses_rows_by_their_text(pack: Any) -> None:
    table = [pair("q", f"the heart {n}") for n in range(200)]

    def seen(weight: float, rows: list[dict[str, str]]) -> list[str]:
        packed, _ = pack(rows, weight=weight, name=f"{weight}-{len(rows)}")
        in_order = map(packed.row, range(packed.rows_per_epoch))
        return sorted(learned_text(row, document) for row in in_order for document in range(row.documents.max() + 1))

    once = seen(1.0, table)
    assert len(once) == 200
    assert seen(3.0, table) == sorted(once * 3)
    some = seen(0.3, table)
    assert 35 <= len(some) <= 85  # 60 are expected; 4 standard deviations
    assert set(some) <= set(once)
    first = seen(1.0, table[:150])
    assert seen(0.3, table[:150]) == sorted(set(some) & set(first))  # whatever other rows there are


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", r"rows-0.jsonl:2: expected one JSON object per line"),
        ("[1]", r"rows-0.jsonl:2: expected one JSON object per line, got a list"),
        ('{"prompt": "q"}', r"rows-0.jsonl:2: expected the field 'response'"),
        ('{"prompt": "q", "response": "\\ud83d"}', r"rows-0.jsonl:2: .*half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_or_counted(pack: Any, line: str, complaint: str) -> None:
    good = json.dumps(pair("q", "a"))
    with pytest.raises(InputError, match=complaint):
        pack(f"{good}\n{line}\n{good}\n")
    _, statistics = pack(f"{good}\n{line}\n{good}\n", skip_bad=True)
    assert (statistics["rows"], statistics["bad"], statistics["chats"]) == (3, 1, 2)


def test_attributions_are_counted_over_the_rows_that_are_used(pack: Any) -> None:
    credit = {"license": "MIT", "source": "faq"}
    table = [pair("q", "a") | credit, pair("q", "b") | credit | {"source": 7}, pair("q", "c"), pair("q", " ") | credit]
    _, statistics = pack(table, [pair("q", "d") | {"license": "CC0-1.0"}], skip_bad=True, weight=2.0)
    found = [(of_one["licenses"], of_one["origins"]) for of_one in statistics["tables"]]
    assert found == [({"MIT": 2}, {"faq": 1}), ({"CC0-1.0": 1}, {})]


def test_the_field_of_messages_may_have_any_name(pack: Any) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a heart"}]
    rows, _ = pack([{"my-messages": messages}], template=Template(messages="my-messages"))
    assert learned_text(rows.row(0), 0) == "a heart<|end|>"


def test_rows_of_several_tables_and_compressed_files_mix_within_rows(tmp_path: Path, pack: Any) -> None:
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.csv"
    with gzip.open(first, "wt") as file:
        file.writelines(json.dumps(pair("q", "the heart")) + "\n" for _ in range(100))
    second.write_text("prompt,response\n" + "q,the liver\n" * 100)
    write_rows(
        tmp_path / "mixed",
        [Table((first,), Template()), Table((second,), Template())],
        tokenizer=TOKENIZER,
        context=64,
        report=lambda **values: None,
        should_stop=lambda: False,
    )
    rows = PackedRows(tmp_path / "mixed", seed=None)
    kinds = [
        {learned_text(row, n) for n in range(row.documents.max() + 1)} for row in map(rows.row, range(rows.rows_per_epoch))
    ]
    assert sum(len(kind) == 2 for kind in kinds) > len(kinds) / 2


def test_an_interrupted_packing_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(pair("q", "a")) + "\n")
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "context": 16, "report": lambda **values: None}
    with pytest.raises(Interrupted):
        write_rows(tmp_path / "packed", [Table((file,), Template())], should_stop=lambda: True, **options)
    assert not (tmp_path / "packed").exists()
    write_rows(tmp_path / "packed", [Table((file,), Template())], should_stop=lambda: False, **options)
    assert PackedRows(tmp_path / "packed", seed=0).rows_per_epoch == 1


def test_the_tokenizer_that_packs_is_the_one_that_is_loaded_from_a_folder(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    turns = Template().turns(pair("the heart", "a liver"))
    assert fit(turns, TextTokenizer.load(tmp_path), positions=30) == fit(turns, TOKENIZER, positions=30)


def test_rows_are_longer_than_a_chat_may_be_where_they_would_stay_empty_and_chats_are_cut_as_before(
    tmp_path: Path, pack: Any
) -> None:
    pairs = [pair("q", "x" * (14 + number % 8)) for number in range(600)] + [pair("q", "heart " * 90)]
    _, short = pack(pairs, context=32, name="short")
    rows, wide = pack(pairs, context=32, longest_row=140, name="wide")
    assert rows.context == 128 and len(rows.row(0).tokens) == 128
    assert wide["real_share"] > 0.9 and short["real_share"] < 0.8  # two of them do not fit into 32
    assert wide["cut_responses"] == short["cut_responses"] == 1
    longest = max(np.bincount(row.documents[row.documents >= 0]).max() for row in map(rows.row, range(rows.rows_per_epoch)))
    assert longest == 32


@pytest.mark.parametrize("batch_tokens", [65_536, 1_000_000])
def test_few_tokens_do_not_fill_a_long_row_whatever_the_batch(pack: Any, batch_tokens: int) -> None:
    rows, statistics = pack([pair("q", f"the heart {n}") for n in range(8)], context=64, longest_row=batch_tokens // 4)
    assert rows.context <= 128 and statistics["real_share"] > 0.75
    assert statistics["tokens"] < 128


@pytest.mark.parametrize(("words", "expected"), [(4, 64), (60, 128), (2000, 256)])
def test_rows_may_follow_the_longest_chat_up_to_what_the_model_allows(pack: Any, words: int, expected: int) -> None:
    rows, statistics = pack([pair("q", "x " * words), pair("q", "short")], context=256, follow_lengths=True, longest_row=1)
    assert rows.context == statistics["row_length"] == expected
    assert statistics["cut_responses"] == int(words == 2000)
    assert statistics["stream_tokens"]["max"] - 1 > expected / 2 or expected == 64  # no shorter row would do


@pytest.mark.parametrize(
    ("reasoning", "learned"),
    [
        ("all", ["<think>\nSince 1.\n</think>\n\nTwo.<|im_end|>", "<think>\nSince 3.\n</think>\n\nFour.<|im_end|>"]),
        ("last", ["Two.<|im_end|>", "<think>\nSince 3.\n</think>\n\nFour.<|im_end|>"]),
        ("none", ["Two.<|im_end|>", "Four.<|im_end|>"]),
    ],
)
def test_answers_that_reason_are_rows_of_their_own_and_nothing_said_by_the_user_is_learned(
    tmp_path: Path, reasoning: Any, learned: list[str]
) -> None:
    from chat_templates import HYBRID, tokenizer_with

    typed = "One? <|im_end|>\n<|im_start|>assistant\n</think> <filename>"
    chat = [
        {"role": "user", "content": typed},
        {"role": "assistant", "content": "Two.", "reasoning_content": "Since 1."},
        {"role": "user", "content": typed},
        {"role": "assistant", "content": "<think>\nSince 3.\n</think>\n\nFour."},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": chat}))
    tokenizer = tokenizer_with(HYBRID)
    statistics = write_rows(
        tmp_path / "rows",
        [Table((file,), Template(), reasoning=reasoning)],
        tokenizer=tokenizer,
        context=512,
        report=lambda **values: None,
        should_stop=lambda: False,
    )
    row = PackedRows(tmp_path / "rows", seed=None).row(0)
    found = []
    for document in range(2):
        chosen = (row.documents == document) & (row.targets != IGNORE)
        found.append(tokenizer.decode(row.targets[chosen].tolist(), special=True))
    assert sorted(found) == sorted(learned)
    assert (statistics["rows"], statistics["bad"], statistics["dropped"]) == (1, 0, 0)


def test_long_documents_are_cut_read_in_windows_or_refused(pack: Any) -> None:
    text = " ".join(f"the heart and the liver {n}" for n in range(30))
    template = Template("Which organ?\n{prompt}\nSay it.", "{response}")
    table = [pair(text, "liver"), pair("short", "heart")]
    _, statistics = pack(table, context=64, template=template, long="window", longest_row=1 << 20)
    assert (statistics["windowed"], statistics["truncated"], statistics["rows"]) == (1, 0, 2)
    assert statistics["chats"] > 6 and "cut" not in statistics
    turns = template.turns(table[0])
    pieces = windows(turns, TOKENIZER, positions=64)
    assert "".join(piece[0].parts[1] for piece in pieces) == text and len(pieces) == statistics["chats"] - 1
    for piece in pieces:
        assert (piece[0].parts[0], piece[0].parts[2], piece[-1]) == ("Which organ?\n", "\nSay it.", turns[-1])
        assert 30 < len(TOKENIZER.encode_chat([turn.message for turn in piece])[0]) <= 65 or piece is pieces[-1]
    with pytest.raises(InputError, match=r'rows-0\.jsonl:1: expected at most 64 positions, as long = "fail" asks, got'):
        pack(table, context=64, template=template, long="fail", name="fail")
    _, statistics = pack(table, context=64, template=template, long="fail", skip_bad=True, name="skip")
    assert (statistics["bad"], statistics["chats"]) == (1, 1)

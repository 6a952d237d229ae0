"""Cleaning of one document: characters, length, repetition."""

import random

import pytest

from llm.text.cleaning import Rules, clean, compressed_share, drop_reason, repeated_line_share


def why(text: str, **rules: float) -> str | None:
    return drop_reason(text, text.encode(), rules=Rules(**rules))  # type: ignore[arg-type]


def test_composed_and_decomposed_characters_become_one() -> None:
    assert clean("cafe\u0301") == "café"


def test_full_width_punctuation_and_ligatures_stay_as_they_are() -> None:
    # NFKC would make them ",:?" and "fi".
    assert clean("你好，世界：ﬁ？") == "你好，世界：ﬁ？"


@pytest.mark.parametrize("end", ["\r\n", "\r", "\x85", "\u2028", "\u2029", "\f", "\v"])
def test_every_line_end_becomes_a_newline(end: str) -> None:
    assert clean(f"a{end}b") == "a\nb"


def test_control_characters_go_and_tabs_and_newlines_stay() -> None:
    assert clean("\ufeffa\x00b\x07\tc\x7f\nd\x9fe\ud800f\ufffe") == "ab\tc\ndef"


def test_zero_width_joiners_stay() -> None:
    assert clean("👩\u200d🔬 می\u200cخواهم") == "👩\u200d🔬 می\u200cخواهم"


def test_cleaning_twice_changes_nothing() -> None:
    text = " \x00 e\u0301\r\n\r\n\u2028x \t\n"
    assert clean(clean(text)) == clean(text)


def test_length_is_counted_in_characters() -> None:
    words = "读书破万卷下笔如有神会当凌绝顶一览众山小"  # 20 characters, 60 bytes
    assert why(words, min_characters=20, max_characters=20) is None
    assert why(words, min_characters=21) == "too_short"
    assert why(words, max_characters=19) == "too_long"


def test_a_document_of_repeated_lines_is_repetition() -> None:
    lines = [f"line {number} tells of {number * 7919 % 1000} different things" for number in range(40)]
    assert why("\n".join(lines)) is None
    assert why("\n".join(lines[:10] * 4)) == "repetition"


def test_repeated_lines_are_counted_in_characters() -> None:
    assert repeated_line_share("abc\nabc\n\n\nabcdef") == 0.25  # 3 of 12


def test_a_phrase_repeated_in_one_line_is_repetition_in_any_script() -> None:
    assert why("buy now cheap " * 200) == "repetition"
    assert why("点击这里免费领取" * 200) == "repetition"
    assert why("=" * 3000) == "repetition"


def test_ordinary_text_is_not_repetition() -> None:
    draw = random.Random(0)
    prose = " ".join("".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(2000))
    assert compressed_share(prose.encode()) > 0.3
    assert why(prose) is None

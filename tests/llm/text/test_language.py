"""Identification of languages, on sentences and on long documents."""

import pytest

from llm.text.language import known_languages, language_of


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The river was quiet that morning, and nobody had slept.", "en"),
        ("Der Fluss war an diesem Morgen still, und niemand hatte geschlafen.", "de"),
        ("La rivière était calme ce matin-là, et personne n'avait dormi.", "fr"),
        ("那天早上河水很安静，没有人睡着过。", "zh"),
        ("その朝、川は静かで、誰も眠っていなかった。", "ja"),
        ("Тем утром река была тиха, и никто не спал.", "ru"),
    ],
)
def test_a_sentence_of_each_language_is_told(text: str, code: str) -> None:
    assert language_of(text) == code
    assert code in known_languages()


def test_a_long_text_is_judged_by_its_beginning_middle_and_end() -> None:
    english, chinese = "The river was quiet that morning. " * 100, "那天早上河水很安静，没有人睡着过。" * 600
    assert language_of("Title and a name\n" + chinese) == "zh"
    assert language_of(chinese[:40] + english) == "en"

"""Published rules of quality: what each drops, on pages made for it, and that prose passes all of them."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from llm.text.quality import failed_rule, keep_prose

ROOT = Path(__file__).parents[3]
WORDS = re.findall(
    r"\w+",
    "the river and of to be that have with a mountain village carried slowly towards morning quiet letters written by people "
    "who remembered long winters near water where children learned names for every bird",
)


def prose(sentences: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "\n".join(" ".join(draw.sample(WORDS, 14)).capitalize() + "." for _ in range(sentences))


def test_prose_passes_every_rule() -> None:
    assert failed_rule(prose(12), ("gopher", "c4", "fineweb")) is None


@pytest.mark.parametrize("name", ["general_en_val", "general_zh_val"])
def test_nearly_all_documents_of_real_prose_pass_gopher_and_fineweb(name: str) -> None:
    with gzip.open(ROOT / "recipes" / "data" / f"{name}.jsonl.gz", "rt") as file:
        texts = [text for line in file if len(text := json.loads(line)["text"]) > 300][:40]
    failed = [found for text in texts if (found := failed_rule(text, ("gopher", "fineweb")))]
    assert len(texts) == 40 and len(failed) <= 5, failed


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("The end of it is that.", "gopher_words"),
        ("a b c of the be to it is I " * 10, "gopher_word_length"),
        ("internationalization of the institutionalization " * 30, "gopher_word_length"),
        (prose(9).replace(" a", " #a").replace(" w", " #w").replace(" t", " #t"), "gopher_symbols"),
        ("\n".join(f"- {line}" for line in prose(12).split("\n")), "gopher_bullets"),
        ("\n".join(f"{line[:-1]}..." for line in prose(9).split("\n")), "gopher_ellipses"),
        (
            " ".join(f"{number * 7919 % 100003} the" if number % 3 else f"{number * 31}" for number in range(200)),
            "gopher_letters",
        ),
        (" ".join(f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(200)), "gopher_stop_words"),
        ("\n".join(prose(6).split("\n") * 2), "gopher_repeated_lines"),
        (" ".join(["click here now"] * 4 + prose(3).split()), "gopher_repeated_words"),
        (f"{prose(6)}\nLorem ipsum dolor sit amet.", "c4_lorem_ipsum"),
        (f"{prose(6)}\nfunction() {{ return; }}", "c4_braces"),
        (prose(4), "c4_sentences"),
        ("\n".join(line[:-1] for line in prose(9).split("\n")), "fineweb_line_ends"),
        ("\n".join([*prose(9).split("\n"), *prose(2).split("\n")]), "fineweb_repeated_lines"),
        ("\n".join(f"{word.capitalize()} it is." for word in WORDS), "fineweb_short_lines"),
    ],
)
def test_each_rule_drops_what_it_is_for(text: str, rule: str) -> None:
    name = rule.partition("_")[0]
    assert failed_rule(text, (name,)) == rule  # type: ignore[arg-type]  # a name of a set
    assert failed_rule(text, ()) is None


def test_thresholds_are_the_published_ones() -> None:
    words = prose(20).split()
    assert failed_rule(" ".join(words[:49]), ("gopher",)) == "gopher_words"
    assert failed_rule(" ".join(words[:50]), ("gopher",)) is None
    lines = prose(10).split("\n")
    assert failed_rule("\n".join([*(f"{line[:-1]}..." for line in lines[:3]), *lines[3:]]), ("gopher",)) is None
    assert failed_rule("\n".join([*(f"{line[:-1]}..." for line in lines[:4]), *lines[4:]]), ("gopher",)) == "gopher_ellipses"
    assert failed_rule(prose(5), ("c4",)) is None


def test_chinese_counts_characters_as_words_and_its_own_ends_of_sentences() -> None:
    draw = random.Random(1)
    letters = [chr(code) for code in range(0x4E00, 0x5E00)]
    text = "\n".join("".join(draw.sample(letters, 24)) + "。" for _ in range(9))
    assert failed_rule(text, ("gopher", "c4", "fineweb")) is None
    assert failed_rule("点击这里免费领取" * 30, ("gopher",)) == "gopher_repeated_words"


def test_c4_keeps_the_lines_that_end_a_sentence() -> None:
    text = (
        "Home | About | Contact\nThe river was quiet that morning.\nPlease enable JavaScript to go on.\n\n\n\nRead more...\n"
        "Two words.\nWe use cookies on this site.\n她走了很远的路。"
    )
    assert keep_prose(text) == "The river was quiet that morning.\n\n她走了很远的路。"


def test_a_text_of_a_million_words_takes_a_few_seconds_at_most_and_an_empty_one_fails() -> None:
    assert failed_rule("", ("gopher",)) == "gopher_words"
    assert failed_rule("a " * 500_000, ("gopher", "c4", "fineweb")) == "gopher_words"

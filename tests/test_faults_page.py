"""The page of faults, recipes/faults.md: every message has its entry, and every entry its message."""

import re

from printed_messages import ROOT, messages

from runner.recipe.validation import validated
from runner.stages import stage_kinds

PAGE = ROOT / "recipes" / "faults.md"
FROM_OUTSIDE = {"run: error: WORDS", "body: MESSAGE"}  # argparse's own words, and pydantic's on a request
BY_VALUES_ALONE = {"SCORE = FOUND, wanted WANTED: failed"}  # no words but the verdict
WRONG = ("wrong", "", -1, 1.5, True, [], [1], {"x": 1}, float("inf"))


def entries(section: str | None = None) -> list[str]:
    """The messages on the page, or in one section of it, as they are written there."""
    text = PAGE.read_text(encoding="utf-8")
    if section is not None:
        text = re.split(r"^#+ ", text.split(f"{section}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return [found[1].strip() for found in re.findall(r"^\* (`+)(.+?)\1\\$", text, re.MULTILINE)]


VALUES = "What validation says of one value"


def test_every_message_has_an_entry() -> None:
    known = entries()
    without = [str(message) for message in messages() if not any(message.pattern().search(entry) for entry in known)]
    assert not without, "recipes/faults.md: expected an entry for each of:\n" + "\n".join(without)


def test_every_entry_has_a_message() -> None:
    there = [message.pattern() for message in messages()]
    outside = {*entries(VALUES), *FROM_OUTSIDE, *BY_VALUES_ALONE}
    stale = [entry for entry in entries() if entry not in outside and not any(one.search(entry) for one in there)]
    assert not stale, "no source says any more:\n" + "\n".join(stale)


def test_every_entry_says_what_to_do() -> None:
    blocks = re.split(r"^\* ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    told = [block for block in blocks if re.match(r"`.*\\\n  \S", block)]
    assert len(told) == len(entries()) > 400


def pattern_of(entry: str) -> str:
    """What an entry stands for: words in capitals are filled in, and `...` is anything."""
    pieces = re.split(r"\b[A-Z]+\b|\.\.\.", entry.removeprefix("PLACE: ").removesuffix("; did you mean NAME?"))
    return ".*".join(map(re.escape, pieces)) + "(; did you mean .*)?"


def test_what_is_said_of_a_wrong_value_is_on_the_page() -> None:
    told: set[str] = set()
    for kind in stage_kinds().values():
        for field in kind.model_fields:
            for value in WRONG:
                faults: list[str] = []
                validated(kind, {field: value}, "stage.NAME.", faults)
                told |= {re.sub(r"^stage\.NAME[\w.\[\]]*: |(?<=found ).*(?=, wants)", "", fault) for fault in faults}
    assert len(told) > 40
    known = re.compile("|".join(map(pattern_of, entries())), re.DOTALL)
    assert not [said for said in told if not known.fullmatch(said)], "recipes/faults.md: expected entries for these"

"""Messages have one form: `PLACE: expected X, got Y`, with the cure where it is not obvious."""

import re

import pytest
from printed_messages import GAP, Message, messages

from runner.recipe.head import Head
from runner.recipe.validation import validated
from runner.stages import stage_kinds

OLD = re.compile(r"\bwant(s|ed)?\b|\bfound .*, expected|\bexpected .*[,;] found\b|; found\b")
OUTCOME = re.compile(
    rf", got\b|, since\b|, which\b|\bbut\b|; |\bis missing\b|\bnot\b|\(|: {GAP}|\w{GAP}"
)  # what it got, a reason, or what to do
PLACE = re.compile(rf"(stage |--)?({GAP}|[\w.\[\]@-])[^,;:]*: ")
WRONG = ("wrong", "", -1, 1.5, True, [], [1], {"x": 1}, float("inf"))


def listed(found: list[Message]) -> str:
    return "\n".join(map(str, found))


def test_the_sources_have_messages_to_look_at() -> None:
    assert len([message for message in messages() if "expected" in message.text]) > 150


def test_no_message_has_another_form() -> None:
    old = [message for message in messages() if OLD.search(message.text)]
    assert not old, listed(old)


def test_a_message_that_expects_something_says_what_it_got_or_what_to_do() -> None:
    bare = [one for one in messages() if re.search(r"(^|: )expected", one.text) and not OUTCOME.search(one.text)]
    assert not bare, listed(bare)


def test_a_message_about_a_recipe_begins_with_its_place() -> None:
    lost = [one for one in messages() if one.error == "RecipeError" and not PLACE.match(one.text)]
    assert not lost, listed(lost)


@pytest.mark.parametrize("table", [Head, *stage_kinds().values()], ids=lambda table: getattr(table, "kind", "head"))
def test_a_wrong_value_is_reported_at_its_field_with_what_was_expected(table: type) -> None:
    seen = 0
    for field in table.model_fields:
        for value in WRONG:
            faults: list[str] = []
            validated(table, {field: value}, "stage.NAME.", faults)
            for fault in (fault for fault in faults if fault.startswith(f"stage.NAME.{field}") and "is missing" not in fault):
                seen += 1
                assert re.match(rf"stage\.NAME\.{field}[\w.\[\]]*: ", fault), fault
                assert re.search(r"expected .*got |is not known here; expected ", fault), fault
    assert seen > 10

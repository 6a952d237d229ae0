"""Templates that make turns of a chat from rows of data."""

from typing import Any

import pytest

from llm.data.conversations import Template, TextTemplate
from llm.errors import InputError


def test_a_row_fills_the_fields_of_prompt_and_response() -> None:
    template = Template("Which section?\n{text}", "{label}")
    turns = template.turns({"text": "It is inherited.", "label": 3, "other": None})
    assert [turn.message for turn in turns] == [
        {"role": "user", "content": "Which section?\nIt is inherited."},
        {"role": "assistant", "content": "3"},
    ]
    assert template.fields == {"text", "label"}


def test_only_what_came_from_the_row_outside_the_response_can_be_cut() -> None:
    user, assistant = Template("Q: {a}, {b}?", "{c}").turns({"a": "one", "b": "two", "c": "three"})
    assert user.substituted() == ("one", "two")
    assert assistant.substituted() == ()
    assert user.with_substituted(iter(["o", ""])).content == "Q: o, ?"


def test_a_document_is_a_field_by_its_name_or_a_template() -> None:
    row = {"body-text": "It beats.", "title": "Heart"}
    for text, wanted in [("body-text", "It beats."), ("{title}!", "Heart!")]:
        (turn,) = TextTemplate(text).turns(row)
        assert turn.message == {"role": "assistant", "content": wanted}
    assert TextTemplate("body-text").fields == {"body-text"}


def test_messages_become_turns_and_only_the_assistants_cannot_be_cut() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    turns = Template(messages="chat").turns({"chat": messages})
    assert [turn.message for turn in turns] == messages
    assert [turn.substituted() for turn in turns] == [("s",), ("u",), ()]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "q"}, "expected the field 'response', got only 'prompt'"),
        ({"prompt": None, "response": "a"}, "expected text or a number in 'prompt', got null"),
        ({"prompt": ["q"], "response": "a"}, "got a list"),
        ({"prompt": True, "response": "a"}, "got true or false"),
        ({"prompt": "q", "response": " \n"}, "the field 'response': expected text, got only white space"),
        ({"prompt": "a \ud83d", "response": "a"}, r"in 'prompt', got '\\ud83d', half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_fill_a_template_is_an_error_with_the_reason(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Template().turns(row)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (None, "expected a list of messages in 'chat', got null"),
        ([], "an empty list"),
        ("hello", "got a string"),
        ([{"role": "user", "content": "q"}], "at least one turn of the assistant"),
        (
            [{"role": "alien", "content": "q"}, {"role": "assistant", "content": "a"}],
            r"chat\[0\].role: expected one of system, user, assistant, tool, got 'alien'",
        ),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "chat\\[0\\].content: expected text, got null"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}],
            "chat\\[1\\].content: expected the assistant's text, got none",
        ),
        (["q", {"role": "assistant", "content": "a"}], r"chat\[0\]: expected a message with role and content, got a string"),
        ([{"role": "assistant", "content": "\udca9"}], r"in chat\[0\], got '\\udca9', half of a surrogate pair"),
    ],
)
def test_messages_that_are_no_chat_are_an_error_with_the_reason(messages: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Template(messages="chat").turns({"chat": messages})

"""Chats and preferences in the forms that people have, known by their fields."""

import json
from typing import Any

import pytest

from llm.data.conversations import PreferenceTemplate, Template
from llm.errors import InputError

USER, ANSWER = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}
DOSE = {"type": "function", "function": {"name": "dose", "arguments": {"of": "aspirin"}}}


def messages(row: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return [turn.message for turn in Template(**options).turns(row)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "One?", "response": "Two."},
        {"prompt": "One?", "completion": "Two."},
        {"prompt": [USER], "completion": [ANSWER]},
        {"question": "One?", "answer": "Two."},
        {"query": "One?", "response": "Two."},
        {"input": "One?", "output": "Two."},
        {"instruction": "One?", "input": "", "output": "Two."},
        {"instruction": "One?", "output": "Two.", "id": 7},
        {"messages": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "On"}, {"type": "text", "text": "e?"}]}, ANSWER]},
        {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]},
        {"conversations": [USER, ANSWER]},
    ],
)
def test_a_row_is_known_by_the_names_of_its_fields(row: dict[str, Any]) -> None:
    assert messages(row) == [USER, ANSWER]


def test_alpaca_has_an_input_a_system_text_and_a_history() -> None:
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Be brief.", "history": [["One?", "Two."]]}
    assert messages(row) == [
        {"role": "system", "content": "Be brief."},
        USER,
        ANSWER,
        {"role": "user", "content": "Add.\n1 + 1"},
        {"role": "assistant", "content": "2"},
    ]
    *_, asked, _ = Template().turns(row)
    assert asked.substituted() == ("Add.", "1 + 1")  # what may be cut


@pytest.mark.parametrize("arguments", [{"of": "aspirin"}, '{"of": "aspirin"}'])
def test_tools_calls_and_reasoning_are_kept(arguments: Any) -> None:
    tool = {"name": "dose", "parameters": {"type": "object"}}
    row = {
        "tools": json.dumps([tool]),
        "messages": [
            {"role": "developer", "content": "Be brief."},
            USER,
            {
                "role": "assistant",
                "content": None,
                "thinking": "Look.",
                "tool_calls": [{"name": "dose", "arguments": arguments}],
            },
            {"role": "tool", "content": "1 mg", "tool_call_id": "a", "name": "dose"},
            {"role": "assistant", "content": "1 mg.", "tool_calls": None, "reasoning_content": None},
        ],
    }
    assert messages(row) == [
        {"role": "system", "content": "Be brief.", "tools": [{"type": "function", "function": tool}]},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "Look.", "tool_calls": [DOSE]},
        {"role": "tool", "content": "1 mg", "name": "dose", "tool_call_id": "a"},
        {"role": "assistant", "content": "1 mg."},
    ]


def test_sharegpt_has_calls_as_messages_of_their_own() -> None:
    call = {"from": "function_call", "value": '{"name": "dose", "arguments": {"of": "aspirin"}}'}
    row = {"conversations": [{"from": "human", "value": "One?"}, call, {"from": "observation", "value": "1"}, ANSWER]}
    assert messages(row)[1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [DOSE]},
        {"role": "tool", "content": "1"},
    ]


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_an_answer_that_is_not_to_be_learned_says_so(field: dict[str, Any]) -> None:
    turns = Template().turns({"messages": [USER, {**ANSWER, **field}, USER, {**ANSWER, "weight": 1}]})
    assert [turn.is_learned for turn in turns if turn.role == "assistant"] == [False, True]


def test_what_a_prompt_of_messages_answers_is_not_learned() -> None:
    turns = Template().turns({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [turn.is_learned for turn in turns if turn.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"a": 1, "b": 2}, "expected fields of a known form .*got only 'a', 'b'; name them"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages\[1\].weight: expected 0 or 1, got 0.5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            r"messages\[0\].content\[0\]: expected a part of text, got 'image_url'",
        ),
        ({"messages": [USER, ANSWER], "images": ["x.png"]}, "expected text alone, got 'images'"),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
            r"messages\[1\].tool_calls\[0\].arguments: expected JSON, got '\{x'",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "expected a call with a name and arguments"),
        ({"messages": [USER, ANSWER], "tools": "dose"}, "tools: expected JSON, got 'dose'"),
        (
            {"instruction": "One?", "output": "Two.", "history": ["One?"]},
            r"history\[0\]: expected an instruction and its answer",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_by_its_name(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Template().turns(row)


def test_a_format_that_is_named_is_the_only_one() -> None:
    row = {"prompt": "no", "response": "no", "conversations": [USER, ANSWER]}
    assert messages(row, format="sharegpt") == [USER, ANSWER]
    with pytest.raises(InputError, match='expected fields of the format "alpaca", got only'):
        Template(format="alpaca").turns(row)


BETTER, WORSE = {"role": "assistant", "content": "Two."}, {"role": "assistant", "content": "Ten."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "One?", "chosen": "Two.", "rejected": "Ten."},
        {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
        {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"prompt": "One?", "chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"question": "One?", "chosen": "Two.", "rejected": "Ten."},
        {"instruction": "One?", "input": "", "chosen": "Two.", "rejected": "Ten."},
        {
            "conversations": [{"from": "human", "value": "One?"}],
            "chosen": {"from": "gpt", "value": "Two."},
            "rejected": {"from": "gpt", "value": "Ten."},
        },
        {"chosen": "\n\nHuman: One?\n\nAssistant: Two.", "rejected": "\n\nHuman: One?\n\nAssistant: Ten."},
        {"chosen": "One? Two.", "rejected": "One? Ten."},
    ],
)
def test_a_preference_is_known_by_its_fields(row: dict[str, Any]) -> None:
    chosen, rejected = PreferenceTemplate().chats(row)
    assert [turn.message for turn in chosen] == [USER, BETTER]
    assert [turn.message for turn in rejected] == [USER, WORSE]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "One?", "chosen": "Two."}, "expected the field 'rejected', got only 'prompt', 'chosen'"),
        (
            {"chosen": "Two.", "rejected": "Ten."},
            "expected a prompt beside 'chosen' and 'rejected', or at the beginning of both",
        ),
        ({"chosen": [BETTER], "rejected": [WORSE]}, "expected a prompt beside the answers or inside them"),
        ({"prompt": "One?", "chosen": "Two.", "rejected": "Two."}, "expected different chosen and rejected answers"),
    ],
)
def test_a_preference_that_is_none_is_refused(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        PreferenceTemplate().chats(row)

"""Rows of chats and of preferences in the forms that people have, recognised by the names of their fields.

Known are prompts with responses (as text or, as TRL has them, as messages), lists of messages (OpenAI, ShareGPT), Alpaca's
instructions, and TRL's preferences, in which the prompt may be inside both answers. This module is imported while planning, so
it imports nothing that is slow.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, get_args

from llm.data.messages import read_messages, turn_of_message, turns_of_messages, with_row
from llm.data.turn import Turn, encodable, field_text, json_type, missing_field
from llm.errors import InputError

Format = Literal["auto", "pairs", "messages", "sharegpt", "alpaca"]
FORMATS: tuple[Format, ...] = get_args(Format)
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"), ("input", "output"))
MESSAGES = ("messages", "conversation", "dialogue", "chat")
SHAREGPT = ("conversations",)
OUTPUTS = ("output", "response", "answer")  # of an instruction
_HUMAN = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic's hh-rlhf


def read_chat(row: Mapping[str, Any], form: Format = "auto") -> list[Turn]:
    """The turns of a row; InputError if its fields are of no known form, or not of `form`."""
    for known, fields in _present(row):
        if form in ("auto", known):
            if known == "pairs":
                return _pair(row, *fields)
            return turns_of_messages(row, fields[0]) if known in ("messages", "sharegpt") else _alpaca(row, *fields)
    raise InputError(_unknown(row, form))


def read_preference(row: Mapping[str, Any]) -> tuple[list[Turn], list[Turn]]:
    """The preferred and the rejected chat of a row, which has fields of these names."""
    missing = next((name for name in ("chosen", "rejected") if name not in row), None)
    if missing is not None:
        raise InputError(missing_field(row, missing))
    answers = [_answer(row[name], name) for name in ("chosen", "rejected")]
    if all(any(turn.role != "assistant" for turn in turns) for turns in answers):
        return _both(with_row(turns, row) for turns in answers)  # the prompt is inside
    if prompt := _prompt(row):
        return _both(with_row([*prompt, *turns], row) for turns in answers)
    if all(isinstance(row[name], str) for name in ("chosen", "rejected")):
        return _implicit(row["chosen"], row["rejected"])
    raise InputError(f"expected a prompt beside the answers or inside them, got only {', '.join(map(repr, row))}")


def _present(row: Mapping[str, Any]) -> Iterator[tuple[Format, Sequence[str]]]:
    """The forms that the fields of a row allow, the likeliest first."""
    for pair in PAIRS[:2]:
        if pair[0] in row and pair[1] in row:
            yield "pairs", pair
    for form, names in (("messages", MESSAGES), ("sharegpt", SHAREGPT)):
        for name in names:
            if isinstance(row.get(name), list | str) and row[name]:
                yield form, (name,)  # type: ignore[misc]  # one of the literals above
    if "instruction" in row:
        for output in OUTPUTS:
            if output in row:
                yield "alpaca", ("instruction", output)
    for pair in PAIRS[2:]:
        if pair[0] in row and pair[1] in row:
            yield "pairs", pair


def _unknown(row: Mapping[str, Any], form: Format) -> str:
    if form == "auto" and "prompt" in row:
        return missing_field(row, "response")
    got = ", ".join(map(repr, row)) or "no field at all"
    if form == "auto":
        pairs = ", ".join(f"{prompt} and {response}" for prompt, response in PAIRS)
        return (
            f"expected fields of a known form ({pairs}; instruction and output; {', '.join((*MESSAGES, *SHAREGPT))}), got "
            "only "
            f"{got}; name them: prompt and response, or messages"
        )
    return f'expected fields of the format "{form}", got only {got}'


def _pair(row: Mapping[str, Any], prompt: str, response: str) -> list[Turn]:
    """Of a prompt and a response, each a text or a list of messages."""
    asked = _said(row, prompt, "user")
    answered = _said(row, response, "assistant")
    if answered[-1].role != "assistant":
        raise InputError(f"expected the assistant's turn last in {response!r}, got the {answered[-1].role}'s")
    # What is said before, if the prompt is a chat, is not what the response teaches.
    turns = [*(turn.learned(False) if turn.role == "assistant" else turn for turn in asked), *answered]
    return with_row(turns, row) if isinstance(row[prompt], list) or row.get("tools") else turns


def _said(row: Mapping[str, Any], field: str, role: str) -> list[Turn]:
    if isinstance(row[field], list) and row[field] and isinstance(row[field][0], Mapping):
        return list(read_messages(row[field], field))
    text = _text(row, field)
    return [Turn(role, (text,) if role == "assistant" else ("", text, ""))]


def _text(row: Mapping[str, Any], field: str) -> str:
    text = field_text(row, field)
    if not text.strip():
        raise InputError(f"the field {field!r}: expected text, got only white space")
    return text


def _alpaca(row: Mapping[str, Any], instruction: str, output: str) -> list[Turn]:
    turns = []
    for number, earlier in enumerate(row.get("history") or ()):
        if not isinstance(earlier, Sequence) or isinstance(earlier, str) or list(map(type, earlier)) != [str, str]:
            raise InputError(f"history[{number}]: expected an instruction and its answer, got {json_type(earlier)}")
        asked, answered = (encodable(text, f"history[{number}]") for text in earlier)
        turns += [Turn("user", ("", asked, "")), Turn("assistant", (answered,))]
    return with_row([*turns, _instruction(row, instruction), Turn("assistant", (_text(row, output),))], row)


def _instruction(row: Mapping[str, Any], instruction: str) -> Turn:
    asked, given = _text(row, instruction), row.get("input")
    return Turn("user", ("", asked, "\n", _text(row, "input"), "") if given else ("", asked, ""))


def _prompt(row: Mapping[str, Any]) -> list[Turn]:
    """What is asked in a row of preferences, if that has a field of its own."""
    for field in (*MESSAGES, *SHAREGPT, "prompt", "question", "query"):
        if row.get(field):
            return list(read_messages(row[field], field)) if field in (*MESSAGES, *SHAREGPT) else _said(row, field, "user")
    if row.get("instruction"):
        return [_instruction(row, "instruction")]
    return _said(row, "input", "user") if row.get("input") else []


def _answer(answer: object, field: str) -> list[Turn]:
    """The turns of an answer: a text, a message, or messages."""
    if isinstance(answer, Mapping):
        return [turn_of_message(answer, field)]
    if isinstance(answer, list):
        return list(read_messages(answer, field))
    if not isinstance(answer, str) or not answer.strip():
        raise InputError(f"the field {field!r}: expected an answer, got {json_type(answer)}")
    return [Turn("assistant", (encodable(answer, repr(field)),))]


def _both(chats: Iterator[list[Turn]]) -> tuple[list[Turn], list[Turn]]:
    chosen, rejected = chats
    return chosen, rejected


def _implicit(chosen: str, rejected: str) -> tuple[list[Turn], list[Turn]]:
    """Of two texts that begin with the same prompt: hh-rlhf's turns, or as TRL does what both have, up to a word."""
    if _HUMAN.match(chosen) and _HUMAN.match(rejected):
        return _human_turns(chosen, "chosen"), _human_turns(rejected, "rejected")
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    cut = max(chosen.rfind(" ", 0, alike), chosen.rfind("\n", 0, alike)) + 1
    prompt = chosen[:cut]
    if not prompt.strip() or cut >= min(len(chosen), len(rejected)):
        raise InputError("expected a prompt beside 'chosen' and 'rejected', or at the beginning of both, got none")
    asked = Turn("user", ("", prompt.strip(), ""))
    return [asked, Turn("assistant", (chosen[cut:],))], [asked, Turn("assistant", (rejected[cut:],))]


def _human_turns(text: str, field: str) -> list[Turn]:
    _, *pieces = _HUMAN.split(encodable(text, repr(field)))
    turns = []
    for who, said in zip(pieces[::2], pieces[1::2], strict=True):
        turns.append(Turn("assistant", (said,)) if who == "Assistant" else Turn("user", ("", said, "")))
    return turns

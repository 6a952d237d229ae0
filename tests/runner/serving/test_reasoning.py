"""Reasoning in answers: asked for or not by a request, and returned beside what is said."""

import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from chat_templates import CHATML, DROPPING, HYBRID, tokenizer_with
from served import serving, taught

from llm.inference.chat_session import AnswerOptions, ChatSession
from llm.inference.sampling import Sampling
from runner.commands.chat import _chat
from runner.serving.reasoning import ReasoningFilter
from runner.serving.server import ServerConfig

ASKED: Any = [{"role": "user", "content": "?"}]


def divided(text: str, *, size: int, begins_in_block: bool) -> tuple[str, str, int]:
    """What comes out for pieces of so many characters, and how much was before what is said."""
    divider = ReasoningFilter(begins_in_block=begins_in_block)
    parts = [divider.passed(text[start : start + size]) for start in range(0, len(text), size)]
    thoughts, said = zip(*parts, divider.rest(), strict=True)
    return "".join(thoughts), "".join(said), divider.before


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("begins_in_block", "text", "thought", "said"),
    [
        (False, "<think>\na < b\n</think>\n\nYes.", "a < b", "Yes."),
        (False, "\n<think></think>Yes.", "", "Yes."),
        (False, " Yes: <think>no</think>", "", " Yes: <think>no</think>"),
        (False, "<thin", "", "<thin"),
        (False, "<think>\n cut </thin", "cut </thin", ""),
        (True, "\na </b>\n\nc\n</think>\n\nYes.</think> \n", "a </b>\n\nc", "Yes.</think> \n"),
        (True, "never closed", "never closed", ""),
        (True, "", "", ""),
    ],
)
def test_reasoning_is_divided_from_what_is_said_however_the_text_is_cut(
    begins_in_block: bool, text: str, thought: str, said: str, size: int
) -> None:
    found = divided(text, size=size, begins_in_block=begins_in_block)
    assert found[:2] == (thought, said)
    if said:
        assert text[found[2] :] == said


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatSession]:
    """Of a template with a switch, of one whose prompt opens the block, and of one that knows nothing of reasoning."""
    folder = tmp_path_factory.mktemp("sessions")
    return {
        "hybrid": taught(folder / "hybrid", tokenizer_with(HYBRID), "<think>lungs</think>heart"),
        "inside": taught(folder / "inside", tokenizer_with(DROPPING, end="<|endoftext|>"), "lungs</think>heart"),
        "plain": taught(folder / "plain", tokenizer_with(CHATML), "heart"),
    }


@pytest.fixture(scope="module")
def client(sessions: dict[str, ChatSession]) -> Iterator[openai.OpenAI]:
    with (
        serving(sessions, ServerConfig(sampling=Sampling(), max_new_tokens=40)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def create(client: openai.OpenAI, model: str, **changes: Any) -> Any:
    return client.chat.completions.create(model=model, messages=ASKED, **changes)


@pytest.mark.parametrize("model", ["hybrid", "inside"])
def test_reasoning_comes_back_beside_the_answer_whole_and_in_a_stream(client: openai.OpenAI, model: str) -> None:
    message = create(client, model, logprobs=True).choices[0].message
    assert (message.reasoning_content, message.content) == ("lungs", "heart")
    pieces = [piece.choices[0] for piece in create(client, model, stream=True, logprobs=True)]
    said = [piece.delta.model_dump() for piece in pieces]
    assert "".join(delta.get("reasoning_content") or "" for delta in said) == "lungs"
    assert "".join(delta["content"] or "" for delta in said) == "heart"
    shown = [token.token for piece in pieces if piece.logprobs for token in piece.logprobs.content]
    assert "".join(shown).endswith("lungs</think>heart"), "the tokens are those of all of the answer"


def test_an_answer_without_reasoning_has_no_such_field(client: openai.OpenAI) -> None:
    message = create(client, "plain").choices[0].message
    assert message.content == "heart" and "reasoning_content" not in message.model_dump()


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, False),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, True),
        ({"extra_body": {"chat_template_kwargs": {}}}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "none", "extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, True),
    ],
)
def test_a_request_says_whether_the_model_thinks(
    client: openai.OpenAI, sessions: dict[str, ChatSession], fields: dict[str, Any], thinking: bool | None
) -> None:
    prompts = {
        switch: len(sessions["hybrid"].tokenizer.encode_prompt(ASKED, thinking=switch)) for switch in (False, True, None)
    }
    assert prompts[False] > prompts[True] == prompts[None]
    assert create(client, "hybrid", max_tokens=1, **fields).usage.prompt_tokens == prompts[thinking]


@pytest.mark.parametrize(
    ("model", "fields", "param", "message"),
    [
        ("plain", {"reasoning_effort": "none"}, "reasoning_effort", "does not read enable_thinking, got False"),
        (
            "inside",
            {"chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs",
            "does not read enable_thinking",
        ),
        ("hybrid", {"chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs.mood", "Unknown parameter"),
        ("hybrid", {"reasoning_effort": "huge"}, "reasoning_effort", "'none'"),
    ],
)
def test_what_a_template_cannot_be_told_is_refused(
    client: openai.OpenAI, model: str, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=ASKED, extra_body=fields)
    error: Any = caught.value.body
    assert error["param"] == param and message in error["message"]


def test_a_conversation_in_the_terminal_can_be_without_reasoning(
    sessions: dict[str, ChatSession], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    answer = ChatSession.answer

    def noted(self: ChatSession, messages: Any, options: Any, **how: Any) -> Any:
        found = answer(self, messages, options, **how)
        asked.append(self.tokenizer.decode(found.prompt))
        return found

    monkeypatch.setattr(ChatSession, "answer", noted)
    for thinking in (None, False):
        monkeypatch.setattr("sys.stdin", io.StringIO("?\n"))
        _chat(sessions["hybrid"], AnswerOptions(max_new_tokens=9), system=None, seed=0, thinking=thinking)
    assert "<think>lungs</think>heart" in capsys.readouterr().out
    assert [prompt.endswith("</think>\n\n") for prompt in asked] == [False, True]


def test_a_server_has_a_default_for_requests_that_do_not_say(sessions: dict[str, ChatSession]) -> None:
    config = ServerConfig(sampling=Sampling(), max_new_tokens=1, thinking=False)
    with serving(sessions, config) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        found = [create(made, "hybrid", **fields).usage.prompt_tokens for fields in ({}, {"reasoning_effort": "high"})]
    assert found[0] > found[1]

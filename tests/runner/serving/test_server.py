"""The server with the OpenAI client, over loopback, and a tiny model with random weights."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from random_model import random_model
from served import serving

from llm.inference.chat_session import AnswerOptions, ChatSession
from llm.inference.sampling import Sampling
from llm.models.decoder.row_step import RowStep
from runner.serving.server import MAX_BYTES, ServerConfig

TEXTS = ["What is asthma? Asthma is a disease of the lungs.", "高血压是什么？高血压是一种病。"] * 20
KEY = "not-a-secret"


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory, compiled_code: None) -> dict[str, ChatSession]:
    """Two models; `tuned` is compiled."""
    folder = tmp_path_factory.mktemp("sessions")
    found = {}
    for seed, name in enumerate(("base", "tuned")):
        random_model(folder / name, TEXTS, 400, seed=seed, hidden_size=32, context=96)
        found[name] = ChatSession(folder / name, compiled=name == "tuned")
    return found


@pytest.fixture(scope="module")
def address(sessions: dict[str, ChatSession]) -> Iterator[str]:
    """The address of a server with both models and a queue of two."""
    with serving(sessions, ServerConfig(sampling=Sampling(), max_new_tokens=16, queue=2, api_key=KEY)) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def user_message(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_the_client_lists_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "tuned"]


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_an_answer_is_the_output_of_the_model(client: openai.OpenAI, sessions: dict[str, ChatSession], name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=user_message("什么是高血压？"), max_tokens=12)
    expected = sessions[name].answer(user_message("什么是高血压？"), AnswerOptions(max_new_tokens=12))
    assert answer.choices[0].message.content == "".join(expected.pieces)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, expected.new_tokens)
    assert answer.choices[0].finish_reason == ("length" if expected.is_cut else "stop")


def test_a_compiled_model_runs_in_the_thread_of_the_server(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    logits = RowStep.logits

    def noted(self: RowStep, *given: Any) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return logits(self, *given)

    monkeypatch.setattr(RowStep, "logits", noted)
    base, tuned = (
        client.chat.completions.create(model=name, messages=user_message("asthma"), max_tokens=12).usage
        for name in ("base", "tuned")
    )
    assert base and tuned and min(base.completion_tokens, tuned.completion_tokens) > 2
    assert len(threads) == tuned.completion_tokens - 1, "the first token comes from reading"
    assert threading.current_thread().name not in threads


def test_a_stream_has_the_same_text_and_whole_characters(client: openai.OpenAI) -> None:
    whole = (
        client.chat.completions.create(model="base", messages=user_message("asthma"), max_tokens=24).choices[0].message.content
    )
    stream = client.chat.completions.create(
        model="base", messages=user_message("asthma"), max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole and len(pieces) > 2
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 24
    assert chunks[-2].choices[0].finish_reason == "length"


def test_a_completion_uses_no_chat_template(client: openai.OpenAI, sessions: dict[str, ChatSession]) -> None:
    found = client.completions.create(model="tuned", prompt="Asthma is", max_tokens=8)
    assert found.choices[0].text == "".join(
        sessions["tuned"].continuation("Asthma is", AnswerOptions(max_new_tokens=8)).pieces
    )


def test_a_seed_reproduces_and_another_differs(client: openai.OpenAI) -> None:
    def say(seed: int) -> str | None:
        made = client.chat.completions.create(
            model="base", messages=user_message("why"), temperature=1.5, seed=seed, max_tokens=16
        )
        return made.choices[0].message.content

    assert say(1) == say(1) != say(2)


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="base", prompt="a", max_tokens=16).choices[0].text
    stop = whole[3:5]
    assert (
        client.completions.create(model="base", prompt="a", max_tokens=16, stop=[stop]).choices[0].text
        == whole[: whole.find(stop)]
    )


def test_a_long_conversation_is_truncated_at_its_start(sessions: dict[str, ChatSession]) -> None:
    turns = [{"role": role, "content": "asthma is a disease"} for _ in range(8) for role in ("user", "assistant")]
    answer = sessions["base"].answer([*turns, *user_message("why")], AnswerOptions(max_new_tokens=8))
    assert answer.forgotten > 0 and answer.forgotten % 2 == 0, "a question goes with its answer"
    assert answer.prompt_tokens + 8 <= 96


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "other"}, 404, "expected one of base, tuned, got 'other'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "expected the last one from the user or a tool, got"),
        ({"messages": [{"role": "user", "content": "asthma " * 200}]}, 400, "context of 96"),
        ({"temperature": -1}, 400, "temperature"),
        ({"stop": [""]}, 400, "stop"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * (MAX_BYTES + 1)}]}, 413, "at most"),
    ],
)
def test_a_bad_request_gets_an_error_message(client: openai.OpenAI, change: dict[str, Any], status: int, message: str) -> None:
    request: dict[str, Any] = {"model": "base", "messages": user_message("hello"), "max_tokens": 4} | change
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=request, cast_to=dict)
    assert caught.value.status_code == status
    assert message in caught.value.message


def test_a_wrong_key_and_another_host_are_refused(address: str) -> None:
    other = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
    with other, pytest.raises(openai.AuthenticationError):
        other.models.list()
    rebound = urllib.request.Request(f"{address}/v1/models", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(rebound)
    assert caught.value.code == 400
    caught.value.close()


def test_a_disconnected_client_releases_its_turn(address: str, client: openai.OpenAI) -> None:
    for _ in range(4):  # more than the queue holds
        stream = client.chat.completions.create(model="base", messages=user_message("why"), max_tokens=80, stream=True)
        next(iter(stream))
        stream.close()
    assert client.chat.completions.create(model="base", messages=user_message("why"), max_tokens=2).choices


def test_requests_beyond_the_queue_are_refused(client: openai.OpenAI) -> None:
    statuses: list[int] = []

    def ask() -> None:
        try:
            client.chat.completions.create(model="base", messages=user_message("why"), max_tokens=80)
            statuses.append(200)
        except openai.APIStatusError as error:
            statuses.append(error.status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert set(statuses) == {200, 429}, statuses


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    with urllib.request.urlopen(f"{address}/") as response:
        page = response.read().decode()
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "http" not in page.replace("http-equiv", ""), "nothing is loaded from elsewhere"
    with urllib.request.urlopen(f"{address}/health") as response:
        deadline = time.monotonic() + 20
        health = json.load(response)
        while health["answers"] and time.monotonic() < deadline:
            with urllib.request.urlopen(f"{address}/health") as again:
                health = json.load(again)
        assert health == {"status": "ok", "answers": 0}

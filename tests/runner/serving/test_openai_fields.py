"""Each field of OpenAI's endpoints is answered as OpenAI answers it, or refused by its name; none is ignored."""

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from served import serving, taught, with_tokens

from llm.inference.chat_session import AnswerOptions, ChatSession
from llm.inference.sampling import Sampling
from llm.models.checkpoint import save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.chat_template import CHAT_TEMPLATE
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe
from runner.serving.server import ServerConfig

CALL = '{"name":"weather", "arguments": {"city" :"Paris"}}'
LLAMA_CALL = CALL.replace("arguments", "parameters")
SAID = f"One moment.<tool_call>{CALL}</tool_call>"
TEXTS = [CALL, LLAMA_CALL, "One moment.", "高血压是什么？高血压是一种病。", "an hour"]
WRITES_CALLS = (  # as ChatML templates with tools have it
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    '{{ \'<tool_call>\n{"name": "\' ~ call.function.name ~ \'", "arguments": \' ~ (call.function.arguments | tojson) ~ \'}\n'
    "</tool_call>' }}{% endfor %}{% endif %}"
)
TOOLS_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ '<|system|>Tools: ' + (tools | tojson) }}{% endif %}"
    "{% for message in messages %}{{ '<|' + ('user' if message.role == 'tool' else message.role) + '|>' + message.content }}"
    f"{WRITES_CALLS}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|assistant|>' }}}}{{% endif %}}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    trained = train_bpe(TEXTS * 20, 420, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True)
    return with_tokens(trained, tmp_path_factory.mktemp("tokenizer"), "<tool_call>", "</tool_call>")  # as ChatML has them


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> dict[str, ChatSession]:
    """`random` has random weights; the others answer with one text, the last with a call in the manner of Llama 3."""
    folder = tmp_path_factory.mktemp("sessions")
    tokenizer.save(folder / "tokenizer")
    torch.manual_seed(0)
    config = DecoderConfig(hidden_size=32, layers=1, heads=2, context=512)
    save_checkpoint(folder / "random", Decoder(config, vocab_size=tokenizer.vocab_size), folder / "tokenizer")
    with_tools = tokenizer.with_template(TOOLS_TEMPLATE)
    return {
        "random": ChatSession(folder / "random"),
        "short": taught(folder / "short", tokenizer, "an hour"),
        "calls": taught(folder / "calls", with_tools, SAID),
        "llama": taught(folder / "llama", with_tools, LLAMA_CALL),
    }


@pytest.fixture(scope="module")
def client(sessions: dict[str, ChatSession]) -> Iterator[openai.OpenAI]:
    with (
        serving(sessions, ServerConfig(sampling=Sampling(), max_new_tokens=12)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    asked: list[Any] = [{"role": "user", "content": "why?"}]
    return client.chat.completions.create(**{"model": "random", "messages": asked, **fields})


def streamed(client: openai.OpenAI, **fields: Any) -> list[Any]:
    return list(chat(client, stream=True, **fields))


def refusal(client: openai.OpenAI, path: str, **fields: Any) -> dict[str, Any]:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path, body=fields, cast_to=object)
    body = caught.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"
    return dict(body)


def test_unseeded_requests_at_temperature_one_differ_and_seeded_ones_do_not(client: openai.OpenAI) -> None:
    def say(**fields: Any) -> str:
        return str(chat(client, temperature=1, max_tokens=24, **fields).choices[0].message.content)

    assert len({say() for _ in range(4)}) == 4
    assert say(seed=7) == say(seed=7)


def test_n_answers_differ_and_count_their_prompt_once(client: openai.OpenAI) -> None:
    one = chat(client, temperature=1, seed=3, max_tokens=9)
    found = chat(client, temperature=1, seed=3, max_tokens=9, n=3)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in found.choices]
    assert len(set(texts)) == 3 and texts[0] == one.choices[0].message.content
    assert found.usage.prompt_tokens == one.usage.prompt_tokens
    assert found.usage.completion_tokens == 27 and found.usage.total_tokens == found.usage.prompt_tokens + 27
    pieces = streamed(client, temperature=1, seed=3, max_tokens=9, n=3)
    for index, text in enumerate(texts):
        own = [piece.choices[0] for piece in pieces if piece.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == text
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == "length"


def test_the_reason_of_an_answer_that_ends_with_its_last_allowed_token_is_stop(
    client: openai.OpenAI, tokenizer: TextTokenizer
) -> None:
    size = len(tokenizer.encode("an hour")) + 1  # with the end token
    for limit, reason, text in ((size - 1, "length", "an hour"), (size, "stop", "an hour"), (size + 1, "stop", "an hour")):
        for field in ("max_tokens", "max_completion_tokens"):
            choice = chat(client, model="short", **{field: limit}).choices[0]
            assert (choice.finish_reason, choice.message.content) == (reason, text), limit
        assert streamed(client, model="short", max_tokens=limit)[-1].choices[0].finish_reason == reason
    cut = chat(client, model="short", max_tokens=size - 1, stop=["hour", "never"]).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("stop", "an "), "the last allowed token completes a stop text"


def test_log_probabilities_are_those_of_the_model(
    client: openai.OpenAI, sessions: dict[str, ChatSession], tokenizer: TextTokenizer
) -> None:
    found = chat(client, logprobs=True, top_logprobs=3, max_tokens=6, logit_bias={"300": 3}, presence_penalty=1)
    entries = found.choices[0].logprobs.content
    assert len(entries) == 6
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "why?"}])
    spelled = b"".join(bytes(entry.bytes) for entry in entries)
    assert spelled.decode(errors="replace") == found.choices[0].message.content
    answer = sessions["random"].answer(
        [{"role": "user", "content": "why?"}],
        AnswerOptions(max_new_tokens=6, sampling=Sampling(logit_bias={300: 3}, presence_penalty=1), likeliest=0),
    )
    list(answer.pieces)
    model = Decoder(DecoderConfig(hidden_size=32, layers=1, heads=2, context=512), vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(hidden_size=32, layers=1, heads=2, context=512), vocab_size=tokenizer.vocab_size)
    tokens = [report.token for report in answer.reports]
    with torch.no_grad():
        scores = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    for entry, token, row in zip(entries, tokens, scores, strict=True):
        assert math.isclose(entry.logprob, float(row[token]), abs_tol=1e-4)
        top = [one.logprob for one in entry.top_logprobs]
        torch.testing.assert_close(torch.tensor(top), row.topk(3).values, atol=1e-4, rtol=0)
    pieces = streamed(client, logprobs=True, max_tokens=6, logit_bias={"300": 3}, presence_penalty=1)
    parts = [one for piece in pieces if piece.choices[0].logprobs for one in piece.choices[0].logprobs.content]
    assert [one.logprob for one in parts] == [one.logprob for one in entries] and parts[0].top_logprobs == []


def test_log_probabilities_of_completions_have_the_older_form(client: openai.OpenAI) -> None:
    found = client.completions.create(model="random", prompt="<", logprobs=2, max_tokens=8).choices[0]
    shown = found.logprobs
    assert shown is not None and shown.tokens and shown.text_offset and shown.top_logprobs
    assert "".join(shown.tokens).startswith(found.text)
    assert shown.text_offset == [len("".join(shown.tokens[:place])) for place in range(len(shown.tokens))]
    assert all(len(top) == 2 for top in shown.top_logprobs)


def test_biases_and_penalties_change_what_is_said(client: openai.OpenAI, tokenizer: TextTokenizer) -> None:
    token = tokenizer.encode("an hour")[0]
    plain = chat(client, max_tokens=12).choices[0].message.content
    forced = chat(client, max_tokens=3, logit_bias={str(token): 100}).choices[0].message.content
    assert forced == tokenizer.decode([token]) * 3
    assert chat(client, max_tokens=12, logit_bias={str(token): -100}).choices[0].message.content == plain
    spread = chat(client, max_tokens=3, logit_bias={str(token): 100}, frequency_penalty=2, presence_penalty=2)
    assert spread.choices[0].message.content == forced, "100 outweighs them"
    repeated = chat(client, max_tokens=12, frequency_penalty=2, presence_penalty=2, logprobs=True).choices[0]
    said = [entry.token for entry in repeated.logprobs.content]
    assert len(set(said)) == len(said), "with random weights, two penalties of 2 outweigh every difference"


def test_a_completion_may_have_many_prompts_as_text_or_tokens_and_echo_them(
    client: openai.OpenAI, tokenizer: TextTokenizer
) -> None:
    ids = [[tokenizer.begin, *tokenizer.encode(text)] for text in ("an", "hour")]
    texts = client.completions.create(model="random", prompt=["an", "hour"], max_tokens=5)
    tokens = client.completions.create(model="random", prompt=ids, max_tokens=5)
    assert [choice.text for choice in texts.choices] == [choice.text for choice in tokens.choices]
    assert texts.usage is not None and texts.usage.prompt_tokens == sum(map(len, ids))
    one = client.completions.create(model="random", prompt=ids[1], max_tokens=5, echo=True)
    assert one.choices[0].text == "hour" + texts.choices[1].text
    none = client.completions.create(model="random", prompt="an", max_tokens=0, echo=True)
    assert (none.choices[0].text, none.choices[0].finish_reason) == ("an", "length")
    several = client.completions.create(model="random", prompt=["an", "hour"], max_tokens=5, n=2, temperature=1, seed=1)
    assert len({choice.text for choice in several.choices}) == 4 and several.usage is not None
    assert several.usage.prompt_tokens == texts.usage.prompt_tokens
    stream = list(client.completions.create(model="random", prompt=["an", "hour"], max_tokens=5, stream=True))
    for index, choice in enumerate(texts.choices):
        assert "".join(piece.choices[0].text for piece in stream if piece.choices[0].index == index) == choice.text


def test_a_developer_is_the_system_and_parts_are_joined(client: openai.OpenAI) -> None:
    user = {"role": "user", "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]}
    answers = [
        chat(client, messages=[{"role": role, "content": "an hour"}, user]).choices[0].message.content
        for role in ("developer", "system")
    ]
    assert answers[0] == answers[1] != chat(client).choices[0].message.content


@pytest.mark.parametrize("model", ["calls", "llama"])
def test_a_call_of_a_tool_is_parsed_and_its_result_can_be_sent_back(client: openai.OpenAI, model: str) -> None:
    found = chat(client, model=model, tools=[WEATHER], max_tokens=80)
    choice = found.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content or "").strip() == ("One moment." if model == "calls" else "")
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Paris"}
    pieces = streamed(client, model=model, tools=[WEATHER], max_tokens=80)
    deltas = [piece.choices[0].delta for piece in pieces]
    (streamed_calls,) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert streamed_calls[0].function.arguments == call.function.arguments and streamed_calls[0].index == 0
    assert "<tool_call>" not in "".join(delta.content or "" for delta in deltas)
    assert pieces[-1].choices[0].finish_reason == "tool_calls"
    asked = {"role": "user", "content": "why?"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [asked, choice.message.model_dump(exclude_unset=True), result]
    again = chat(client, model=model, tools=[WEATHER], messages=messages, max_tokens=4)
    without = chat(client, model=model, tools=[WEATHER], messages=[asked], max_tokens=4)
    assert again.usage.prompt_tokens > without.usage.prompt_tokens + 20, "the template has the call and its result"


def test_without_tools_or_with_the_choice_none_a_call_is_text(client: openai.OpenAI) -> None:
    assert chat(client, model="calls", max_tokens=80).choices[0].message.content == SAID
    none = chat(client, model="calls", max_tokens=80, tools=[WEATHER], tool_choice="none")
    assert none.choices[0].message.content == SAID and none.choices[0].finish_reason == "stop"
    other = {"type": "function", "function": {"name": "other"}}
    unknown = chat(client, model="calls", max_tokens=80, tools=[other]).choices[0]
    assert unknown.message.content == SAID and not unknown.message.tool_calls, "a call of a tool that was not offered"


def test_tools_are_refused_where_the_template_does_not_tell_of_them(client: openai.OpenAI) -> None:
    asked = [{"role": "user", "content": "why?"}]
    body = refusal(client, "/chat/completions", model="random", messages=asked, tools=[WEATHER])
    assert body["param"] == "tools" and "got one that does not" in body["message"]


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["lung", "heart"]}, "count": {"type": "integer", "minimum": 3, "maximum": 5}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_an_answer_with_a_schema_fits_it_whatever_the_model_would_say(client: openai.OpenAI, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "finding", "schema": SCHEMA, "strict": True}}
    found = chat(client, response_format=form, temperature=temperature, max_tokens=200, n=2)
    for choice in found.choices:
        value = json.loads(choice.message.content)
        assert set(value) == {"kind", "count"} and value["kind"] in ("lung", "heart") and value["count"] in (3, 4, 5)
        assert choice.finish_reason == "stop"
    pieces = streamed(client, response_format=form, temperature=temperature, max_tokens=200)
    assert set(json.loads("".join(piece.choices[0].delta.content or "" for piece in pieces))) == {"kind", "count"}


def test_json_without_a_schema_is_an_object(client: openai.OpenAI, tokenizer: TextTokenizer) -> None:
    # The random model would write a string for ever. What begins no object is not said, though it is likelier.
    bias = {str(tokenizer.encode(text)[0]): likely for text, likely in (("an", 99), ("]", 98), ("{", 97), ("}", 96))}
    choice = chat(client, response_format={"type": "json_object"}, max_tokens=60, logit_bias=bias).choices[0]
    assert choice.message.content == "{}" and choice.finish_reason == "stop"


def test_null_stands_for_the_default_of_every_field(client: openai.OpenAI) -> None:
    plain = chat(client).choices[0].message.content
    names = (
        "stream stream_options n stop logprobs top_logprobs tools tool_choice response_format max_tokens seed user logit_bias "
        "max_completion_tokens temperature top_p presence_penalty frequency_penalty metadata store functions modalities"
    )
    body = {"model": "random", "messages": [{"role": "user", "content": "why?", "name": None}]}
    found: Any = client.post("/chat/completions", body=body | dict.fromkeys(names.split()), cast_to=object)
    assert found["choices"][0]["message"]["content"] == plain


def test_a_stream_has_usage_only_when_asked(client: openai.OpenAI) -> None:
    assert all(piece.usage is None for piece in streamed(client))
    asked = streamed(client, stream_options={"include_usage": True})
    assert asked[-1].usage.completion_tokens == 12 and not asked[-1].choices


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"tempurature": 1}, "tempurature", "Unknown parameter: 'tempurature'."),
        ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages[0].mood", "Unknown parameter"),
        ({"messages": None}, "messages", "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "expected text, got null"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'tool'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "expected 'text'",
        ),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "less than or equal to 128"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least one character"),
        ({"logit_bias": {"50": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "expected tokens from 0 to"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs = true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"tool_choice": "auto"}, "tool_choice", "with tools"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing required parameter"),
        ({"functions": []}, "functions", "does not support"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not read enable_thinking"),
        ({"store": True}, "store", "False"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "got the type json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "text"}}}},
            "response_format",
            "schema",
        ),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"seed": 0.5}, "seed", "valid integer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_chat_cannot_have_is_refused_by_name(
    client: openai.OpenAI, change: dict[str, Any], param: str, message: str
) -> None:
    fields = {"model": "random", "messages": [{"role": "user", "content": "why?"}]} | change
    body = refusal(client, "/chat/completions", **fields)
    assert str(body["param"]).startswith(param) and message in body["message"], body


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": []}, "prompt", "expected text or tokens, got none"),
        ({"prompt": [[]]}, "prompt", "expected text or tokens, got none"),
        ({"prompt": [99999]}, "prompt", "expected tokens from 0 to"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "at most 128 answers"),
        ({"best_of": 3}, "best_of", "answers are not ranked"),
        ({"suffix": "b"}, "suffix", "does not support"),
        ({"echo": True, "logprobs": 1}, "logprobs", "none with echo"),
        ({"messages": []}, "messages", "Unknown parameter"),
    ],
)
def test_what_a_completion_cannot_have_is_refused_by_name(
    client: openai.OpenAI, change: dict[str, Any], param: str, message: str
) -> None:
    body = refusal(client, "/completions", **({"model": "random", "prompt": "a"} | change))
    assert body["param"] == param and message in body["message"], body


def test_the_template_of_other_models_is_known_by_what_it_renders(tokenizer: TextTokenizer) -> None:
    from runner.serving.tool_calls import tools_fault

    assert tools_fault(tokenizer.with_template(TOOLS_TEMPLATE), [WEATHER]) is None
    assert "got one that does not" in str(tools_fault(tokenizer.with_template(CHAT_TEMPLATE), [WEATHER]))
    other = TOOLS_TEMPLATE.replace('{"name": "', "<function=").replace("{% if message.tool_calls", "{% if message.tool_calls")
    assert "expected a chat template that writes calls as JSON" in str(tools_fault(tokenizer.with_template(other), [WEATHER]))

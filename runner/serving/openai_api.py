"""The requests of the OpenAI-compatible endpoints: every field is answered, or refused by its name.

A field whose type is None is one of OpenAI that this server does not support: only null is accepted.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runner.serving.openai_messages import STRICT, Message, Tool

MAX_MESSAGES = 256
MAX_STOPS = 4
MAX_ANSWERS = 128  # to one request: prompts times n
LEAST_TOP_P = 1e-9  # for a top_p of 0: the likeliest token alone

Count = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class JsonSchema(BaseModel):
    """A schema that an answer has to fit."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None  # it is strict in any case


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"json_schema: expected it where the type is json_schema, got the type {self.type}")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema that the answer has to fit; None for text."""
        if self.type == "text":
            return None
        return (self.json_schema and self.json_schema.schema_) or {"type": "object"}


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = STRICT

    include_usage: bool | None = None  # whether it ends with token counts
    include_obfuscation: Literal[False] | None = None


class Request(BaseModel):
    """The fields of both endpoints; `user` has no effect, since nothing is stored."""

    model_config = STRICT

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Count | None = None  # this server's own, as are the next two
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling` that the request sets."""
        names = ("temperature", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_p is not None:
            found["top_p"] = self.top_p or LEAST_TOP_P
        if self.logit_bias:
            found["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return found

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if "" in self.stops:
            raise ValueError("stop: expected strings of at least one character, got an empty one")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected it with stream = true, got no stream")
        return self


class TemplateKwargs(BaseModel):
    """What a request tells the chat template, as vLLM and llama.cpp have it."""

    model_config = STRICT

    enable_thinking: bool | None = None


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None  # "none", or any
    # Without effect: nothing is stored, and there is one tier.
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    verbosity: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None

    @property
    def max_new_tokens(self) -> int | None:
        """The longest answer in tokens; the newer of the two field names wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many alternatives of each token to report; None reports no tokens."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def thinking(self) -> bool | None:
        """Whether the answer begins with reasoning; None leaves it to the template."""
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def uses_tools(self) -> bool:
        """Whether the template has to know of tools."""
        return bool(self.offered) or any(message.tool_calls or message.role == "tool" for message in self.messages)

    @model_validator(mode="after")
    def _fits_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected it with logprobs = true, got none")
        if self.tool_choice is not None and not self.tools:
            raise ValueError("tool_choice: expected it with tools, got none")
        if self.offered and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("response_format: expected text where there are tools, got JSON, which could be no call")
        return self


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None
    suffix: None = None

    @property
    def max_new_tokens(self) -> int | None:
        """The longest answer in tokens."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many alternatives of each token to report; None reports no tokens."""
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(part, int) for part in self.prompt):
            return [self.prompt]  # type: ignore[list-item]  # a list of tokens
        return self.prompt  # type: ignore[return-value]  # a list of texts or of lists of tokens

    @model_validator(mode="after")
    def _fits_completion(self) -> Self:
        if not self.prompt or [] in self.prompts:
            raise ValueError("prompt: expected text or tokens, got none")
        if len(self.prompts) * (self.n or 1) > MAX_ANSWERS:
            raise ValueError(
                f"prompt: expected at most {MAX_ANSWERS} answers, got {len(self.prompts)} prompts x {self.n or 1}"
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of: expected {self.n or 1}, which n is, got {self.best_of}: answers are not ranked")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs: expected none with echo, got some: only the answer's tokens have them here")
        return self

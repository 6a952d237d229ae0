"""The requests and responses of the OpenAI-compatible endpoints.

Unsupported fields that would change an answer are refused; fields without effect here (`user`, `metadata`) are ignored.
Reference: https://platform.openai.com/docs/api-reference/chat
"""

import time
import uuid
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_MESSAGES = 256
MAX_STOPS = 4


class Part(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    @property
    def plain(self) -> dict[str, str]:
        """The message for a chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class StreamOptions(BaseModel):
    """Whether a stream ends with token counts."""

    include_usage: bool = False


class Request(BaseModel):
    """The fields of both endpoints."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """The longest answer in tokens."""
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @model_validator(mode="after")
    def _stops_have_text(self) -> Self:
        if "" in self.stops:
            raise ValueError("stop: expected strings of at least one character, got an empty one")
        return self


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """The longest answer in tokens; the newer of the two field names wins."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: str
    echo: Literal[False] | None = None


class ResponseFormat:
    """The response format of one answer, whole or streamed, of a chat or a completion."""

    def __init__(self, *, model: str, chat: bool) -> None:
        self._chat = chat
        name = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._whole = {"object": name, **self._head}
        self._piece = {"object": f"{name}.chunk" if chat else name, **self._head}

    def whole(self, text: str, *, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {**self._whole, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}], "usage": usage}

    def piece(self, text: str | None, *, reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """A piece of a stream; its end if `text` is None."""
        role = {"role": "assistant"} if first else {}
        content = {"delta": {} if text is None else {**role, "content": text}} if self._chat else {"text": text or ""}
        return {**self._piece, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece of a stream with token counts."""
        return {**self._piece, "choices": [], "usage": usage}


def error_body(message: str, *, code: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error response."""
    kind = "server_error" if code == "internal_error" else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

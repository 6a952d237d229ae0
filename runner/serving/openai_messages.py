"""The messages and tools of a request to the chat endpoint, as OpenAI has them and as chat templates want them."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Part(BaseModel):
    """A part of a message; only text is supported."""

    model_config = STRICT

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """A call that the assistant made."""

    model_config = STRICT

    name: str
    arguments: str

    def parsed(self) -> Any:
        """The arguments as a value; ValueError if they are not JSON."""
        return json.loads(self.arguments or "{}")


class ToolCall(BaseModel):
    """A call of a message of the assistant."""

    model_config = STRICT

    id: str
    type: Literal["function"] = "function"
    index: int | None = None  # as a stream has it
    function: FunctionCall


class Message(BaseModel):
    """A message of a chat; what an answer of this server or of OpenAI holds beside its text may come back as null."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None  # given to the chat template
    reasoning_content: str | None = None  # of the assistant; given to the chat template
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _fits_role(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: expected text, got null")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: expected them in a message of the assistant, got one of the {self.role}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError(f"tool_call_id: expected one in messages of the role tool alone, got {self.tool_call_id!r}")
        for call in self.tool_calls or ():
            try:
                call.function.parsed()
            except ValueError:
                raise ValueError(f"tool_calls: expected arguments that are JSON, got {call.function.arguments!r}") from None
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """The message for a chat template: as Transformers has it, with arguments as values."""
        content = self.content or ""
        found: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.parsed()},
                }
                for call in self.tool_calls
            ]
        more = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        return found | {name: value for name, value in more.items() if value is not None}


class Function(BaseModel):
    """A function that the model may call."""

    model_config = STRICT

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None  # calls are not constrained


class Tool(BaseModel):
    """A tool that the model may use."""

    model_config = STRICT

    type: Literal["function"]
    function: Function

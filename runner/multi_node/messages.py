"""What machines say to each other. Whatever does not have exactly one of these forms ends the connection."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

Message = Mapping[str, Any]
Line = Annotated[str, StringConstraints(max_length=1000)]
Told = Annotated[str, StringConstraints(max_length=100_000)]
Rank = Annotated[int, Field(ge=0, le=10**6)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Welcome(_Form):
    """Machine 0 introduces itself; `token` is a file in its cache."""

    do: Literal["welcome"]
    who: Line
    token: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    machines: Rank


class Train(_Form):
    """A training begins: what it is, and the records of what it reads."""

    do: Literal["train"]
    attempt: int
    stage: Line
    processes: Rank
    identities: dict[Line, dict[str, Any]]
    records: list[str]


class Go(_Form):
    """All machines are ready."""

    do: Literal["go"]
    attempt: int


class Note(_Form):
    """A message for the users of the other machines."""

    do: Literal["note"]
    text: Told


class Over(_Form):
    """How the run of machine 0 ended."""

    do: Literal["over"]
    code: Annotated[int, Field(ge=0, le=255)]
    message: Told


class Hello(_Form):
    """Another machine introduces itself."""

    do: Literal["hello"]
    rank: Rank
    machines: Rank
    who: Line
    shares: bool
    remote: Line | None = None


class Ready(_Form):
    """It is ready for a training."""

    do: Literal["ready"]
    attempt: int


class Failed(_Form):
    """Its processes failed."""

    do: Literal["failed"]
    attempt: int
    cause: Told
    again: bool


class Refuse(_Form):
    """It disagrees about a training."""

    do: Literal["refuse"]
    attempt: int
    why: Told


class Stop(_Form):
    """It was asked to stop."""

    do: Literal["stop"]


FROM_MAIN: TypeAdapter[Any] = TypeAdapter(Annotated[Welcome | Train | Go | Note | Over, Field(discriminator="do")])
FROM_OTHERS: TypeAdapter[Any] = TypeAdapter(
    Annotated[Hello | Ready | Failed | Refuse | Note | Stop, Field(discriminator="do")]
)


def parsed(line: bytes, *, from_main: bool) -> Message:
    """The message in a line of JSON; ValueError if it has none of the forms. Nesting is limited by pydantic's parser."""
    found: BaseModel = (FROM_MAIN if from_main else FROM_OTHERS).validate_json(line)
    return found.model_dump()

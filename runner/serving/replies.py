"""One answer to a request while the model writes it: its text, its calls of tools, and its tokens' log-probabilities."""

from collections.abc import AsyncIterator, Container, Iterator
from typing import TYPE_CHECKING, Any

from runner.serving.openai_responses import Finished, Responses, TokenLogprobs
from runner.serving.reasoning import ReasoningFilter
from runner.serving.tool_calls import Call, CallFilter

if TYPE_CHECKING:
    from llm.inference.chat_session import Answer


class Reply:
    """Takes the pieces of `answer`. Calls are of tools with the names `tools`; `reasoning` divides off what comes before the
    answer proper; `echo` is text before it."""

    def __init__(
        self,
        answer: "Answer",
        *,
        tools: Container[str] = (),
        one_call: bool = False,
        reasoning: ReasoningFilter | None = None,
        logprobs: TokenLogprobs | None = None,
        echo: str = "",
    ) -> None:
        self.answer, self._logprobs, self._one_call = answer, logprobs, one_call
        self._filter = CallFilter(tools) if tools else None
        self._reasoning = reasoning
        self._thought, self._text, self._echo = "", "", echo
        self._calls: list[Call] = []

    def finished(self) -> Finished:
        """The whole of it."""
        return Finished(self._echo + self._text, self._reason, self._calls, self._shown(), self._thought)

    def take(self, piece: str) -> tuple[str, str]:
        """The next piece of the answer; what of its reasoning and its text is ready."""
        thought, piece = self._reasoning.passed(piece) if self._reasoning else ("", piece)
        return self._ready(thought, piece)

    def _ready(self, thought: str, piece: str) -> tuple[str, str]:
        ready = self._filter.passed(piece) if self._filter else piece
        self._thought += thought
        self._text += ready
        return thought, ready

    def end(self) -> tuple[str, str]:
        """The end of the answer; what of its reasoning and its text was held back."""
        thought, ready = self._ready(*(self._reasoning.rest() if self._reasoning else ("", "")))
        if self._filter is None:
            return thought, ready
        rest, calls = self._filter.rest()
        self._calls = calls[:1] if self._one_call else calls
        self._text += rest
        return thought, ready + rest

    async def events(self, pieces: AsyncIterator[str], responses: Responses, index: int) -> AsyncIterator[dict[str, Any]]:
        """The answer as pieces of a stream."""
        if (first := responses.begin(index)) is not None:
            yield first
        if self._echo:
            yield responses.text(index, self._echo)
        async for piece in pieces:
            for event in self._event(*self.take(piece), responses, index):
                yield event
        for event in self._event(*self.end(), responses, index):
            yield event
        if self._calls:
            yield responses.calls(index, self._calls)
        yield responses.end(index, self._reason)

    def _event(self, thought: str, ready: str, responses: Responses, index: int) -> Iterator[dict[str, Any]]:
        if thought:
            yield responses.text(index, thought, self._shown(), field="reasoning_content")
        if ready:
            yield responses.text(index, ready, self._shown())

    def _shown(self) -> dict[str, Any] | None:
        """The log-probabilities of the tokens of the text that is ready, but for those shown before."""
        before = self._reasoning.before if self._reasoning else 0
        return self._logprobs.shown(self.answer.reports, before + len(self._text)) if self._logprobs else None

    @property
    def _reason(self) -> str:
        return "tool_calls" if self._calls else self.answer.ending.reason

"""One answer to a request while the model writes it: its text, its calls of tools, and its tokens' log-probabilities."""

from collections.abc import AsyncIterator, Container, Iterator
from typing import TYPE_CHECKING, Any

from runner.serving.openai_responses import Finished, Responses, TokenLogprobs
from runner.serving.tool_calls import Call, CallFilter

if TYPE_CHECKING:
    from llm.inference.chat_session import Answer


class Reply:
    """Takes the pieces of `answer`. Calls are of tools with the names `tools`; `echo` is text before the answer."""

    def __init__(
        self,
        answer: "Answer",
        *,
        tools: Container[str] = (),
        one_call: bool = False,
        logprobs: TokenLogprobs | None = None,
        echo: str = "",
    ) -> None:
        self.answer, self._logprobs, self._one_call = answer, logprobs, one_call
        self._filter = CallFilter(tools) if tools else None
        self._text, self._echo = "", echo
        self._calls: list[Call] = []

    def finished(self) -> Finished:
        """The whole of it."""
        return Finished(self._echo + self._text, self._reason, self._calls, self._shown())

    def take(self, piece: str) -> str:
        """The next piece of the answer; what of its text is ready."""
        ready = self._filter.passed(piece) if self._filter else piece
        self._text += ready
        return ready

    def end(self) -> str:
        """The end of the answer; what of its text was held back."""
        if self._filter is None:
            return ""
        rest, calls = self._filter.rest()
        self._calls = calls[:1] if self._one_call else calls
        self._text += rest
        return rest

    async def events(self, pieces: AsyncIterator[str], responses: Responses, index: int) -> AsyncIterator[dict[str, Any]]:
        """The answer as pieces of a stream."""
        if (first := responses.begin(index)) is not None:
            yield first
        if self._echo:
            yield responses.text(index, self._echo)
        async for piece in pieces:
            for event in self._event(self.take(piece), responses, index):
                yield event
        for event in self._event(self.end(), responses, index):
            yield event
        if self._calls:
            yield responses.calls(index, self._calls)
        yield responses.end(index, self._reason)

    def _event(self, ready: str, responses: Responses, index: int) -> Iterator[dict[str, Any]]:
        if ready:
            yield responses.text(index, ready, self._shown())

    def _shown(self) -> dict[str, Any] | None:
        """The log-probabilities of the tokens of the text that is ready, but for those shown before."""
        return self._logprobs.shown(self.answer.reports, len(self._text)) if self._logprobs else None

    @property
    def _reason(self) -> str:
        return "tool_calls" if self._calls else self.answer.ending.reason

"""The server: a chat page, and OpenAI-compatible endpoints.

One thread owns the models and generates one answer at a time; further requests wait in a bounded queue. If a client
disconnects, its answer is aborted. Conversations are not stored.
"""

import asyncio
import contextlib
import hmac
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runner.serving.openai_api import ChatRequest, CompletionRequest
from runner.serving.openai_responses import Responses, TokenLogprobs, error_body, usage, validation_error
from runner.serving.reasoning import ReasoningFilter, begins_in_block, thinking_fault
from runner.serving.replies import Reply
from runner.serving.tool_calls import tools_fault

if TYPE_CHECKING:
    from llm.inference.chat_session import Answer, AnswerOptions, ChatSession
    from llm.inference.sampling import Sampling

PAGE = Path(__file__).parents[1] / "pages" / "chat.html"
MAX_BYTES = 1 << 20  # of a request
PARAMETERS = {"schema": "response_format"}  # the field of a request that an error is about, where its name differs
T = TypeVar("T")


@dataclass(frozen=True)
class ServerConfig:
    """The defaults and limits of a server."""

    sampling: "Sampling"  # but for its seed
    max_new_tokens: int
    thinking: bool | None = None  # of requests that do not say
    seed: int | None = None  # of requests without one; None is another for each
    queue: int = 16  # requests that may wait
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")  # accepted Host headers
    api_key: str | None = None
    samples: tuple[str, ...] = ()  # prompts to try on the page


class RefusedError(Exception):
    """A refused request."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, code=code, param=param)

    @classmethod
    def of(cls, status: int, body: Mapping[str, Any]) -> Self:
        """With this body."""
        error = body["error"]
        return cls(status, error["message"], code=error["code"], param=error["param"])


class Server:
    """The models by name, and the queue of requests."""

    def __init__(self, models: Mapping[str, "ChatSession"], config: ServerConfig) -> None:
        self._models, self._config = dict(models), config
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="session")
        self._turn = asyncio.Semaphore(1)
        self._active = 0  # requests that run or wait

    def app(self) -> Starlette:
        """The server as an ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/samples", self.samples),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {RefusedError: _refuse, HTTPException: _http_fault, Exception: _unexpected}
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(self._config.hosts), www_redirect=False)
        return Starlette(routes=routes, middleware=[trusted], exception_handlers=handlers)

    async def page(self, request: HttpRequest) -> Response:
        """`GET /`, the chat page."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        return FileResponse(PAGE, media_type="text/html", headers={"Content-Security-Policy": policy})

    async def health(self, request: HttpRequest) -> Response:
        """`GET /health`, with the number of requests that run or wait."""
        return JSONResponse({"status": "ok", "answers": self._active})

    async def samples(self, request: HttpRequest) -> Response:
        """`GET /samples`, prompts to try; with the key, since they are rows of somebody."""
        self._check_key(request)
        return JSONResponse({"prompts": list(self._config.samples)})

    async def models(self, request: HttpRequest) -> Response:
        """`GET /v1/models`."""
        self._check_key(request)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "stockpot", "context": session.context}
            for name, session in self._models.items()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request: HttpRequest) -> Response:
        """`POST /v1/chat/completions`."""
        parsed = await self._read(request, ChatRequest)
        name, session = self._model(parsed.model)
        if not session.chats:
            raise RefusedError(
                400, f"the model {name!r} has no chat template; use /v1/completions", code="no_chat", param="model"
            )
        messages = [message.plain for message in parsed.messages]
        if messages[-1]["role"] not in ("user", "tool"):
            last = f"messages: expected the last one from the user or a tool, got {messages[-1]['role']}"
            raise RefusedError(400, last, code="invalid_value", param="messages")
        schema = parsed.response_format.schema_of_answer if parsed.response_format else None

        def begin() -> Iterator[Reply]:
            if parsed.uses_tools and (fault := tools_fault(session.tokenizer, parsed.offered)):
                raise RefusedError(400, f"tools: {fault}", code="unsupported_parameter", param="tools")
            if fault := thinking_fault(session.tokenizer, parsed.thinking):
                field = "reasoning_effort" if parsed.chat_template_kwargs is None else "chat_template_kwargs"
                raise RefusedError(400, f"{field}: {fault}", code="unsupported_parameter", param=field)
            thinking = self._config.thinking if parsed.thinking is None else parsed.thinking
            inside = schema is None and begins_in_block(session.tokenizer, thinking)
            for options in self._options(parsed, schema=schema):
                yield Reply(
                    session.answer(messages, options, tools=parsed.offered, thinking=thinking),
                    reasoning=ReasoningFilter(begins_in_block=inside),
                    tools=[tool["function"]["name"] for tool in parsed.offered],
                    one_call=parsed.parallel_tool_calls is False,
                    logprobs=_logprobs(session, parsed, chat=True),
                )

        return await self._respond(request, parsed, begin, Responses(model=name, chat=True, wants_usage=parsed.wants_usage))

    async def complete(self, request: HttpRequest) -> Response:
        """`POST /v1/completions`."""
        parsed = await self._read(request, CompletionRequest)
        name, session = self._model(parsed.model)

        def begin() -> Iterator[Reply]:
            for prompt in parsed.prompts:
                said = prompt if isinstance(prompt, str) else session.tokenizer.decode(prompt)
                for options in self._options(parsed):
                    answer = session.continuation(prompt, options)
                    shown = _logprobs(session, parsed, chat=False)
                    yield Reply(answer, logprobs=shown, echo=said if parsed.echo else "")

        return await self._respond(request, parsed, begin, Responses(model=name, chat=False, wants_usage=parsed.wants_usage))

    def _options(
        self, parsed: ChatRequest | CompletionRequest, *, schema: Mapping[str, Any] | None = None
    ) -> Iterator["AnswerOptions"]:
        """What is asked of each of the `n` answers to one prompt."""
        from llm.inference.chat_session import AnswerOptions

        seed = secrets.randbits(63) if self._config.seed is None else self._config.seed
        limit = parsed.max_new_tokens
        for index in range(parsed.n or 1):
            yield AnswerOptions(
                max_new_tokens=self._config.max_new_tokens if limit is None else limit,
                sampling=replace(self._config.sampling, **{"seed": seed} | parsed.sampling),
                stop=parsed.stops,
                index=index,
                schema=schema,
                likeliest=parsed.likeliest,
            )

    async def _respond(
        self,
        request: HttpRequest,
        parsed: ChatRequest | CompletionRequest,
        begin: Callable[[], Iterator[Reply]],
        responses: Responses,
    ) -> Response:
        """Waits for a turn, begins the answers, and returns them whole or as a stream."""
        turn = contextlib.AsyncExitStack()
        await turn.enter_async_context(self._turn_of(request))
        try:
            replies = await self._call(lambda: _refusing(lambda: list(begin())))
        except BaseException:
            await turn.aclose()
            raise
        if parsed.stream:
            return Stream(self._events(replies, parsed, responses), turn)
        async with turn:
            for reply in replies:
                async with contextlib.aclosing(self._pieces(reply.answer, request)) as pieces:
                    async for piece in pieces:
                        reply.take(piece)
                reply.end()
        return JSONResponse(responses.whole([reply.finished() for reply in replies], _usage(replies, parsed)))

    async def _events(
        self, replies: list[Reply], parsed: ChatRequest | CompletionRequest, responses: Responses
    ) -> AsyncGenerator[str, None]:
        """Server-sent events: one answer after the other."""
        try:
            for index, reply in enumerate(replies):
                async with contextlib.aclosing(self._pieces(reply.answer)) as pieces:
                    async for event in reply.events(pieces, responses, index):
                        yield _event(event)
            if parsed.wants_usage:
                yield _event(responses.usage(_usage(replies, parsed)))
            yield "data: [DONE]\n\n"
        except RefusedError as error:  # the status was sent, so the stream has the error
            yield _event(error.body)
        except Exception as error:
            yield _event(error_body(f"{type(error).__name__}: {error}", code="internal_error"))

    async def _pieces(self, answer: "Answer", request: HttpRequest | None = None) -> AsyncGenerator[str, None]:
        """The pieces, made in the models' thread; aborted if the client of `request` disconnects."""
        try:
            while (piece := await self._call(lambda: _refusing(lambda: next(answer.pieces, None)))) is not None:
                yield piece
                if request is not None and await request.is_disconnected():
                    raise RefusedError(499, "the client disconnected", code="gone")
        finally:
            await asyncio.shield(self._call(lambda: _close(answer)))

    @contextlib.asynccontextmanager
    async def _turn_of(self, request: HttpRequest) -> AsyncIterator[None]:
        """A turn at the models; RefusedError if the queue is full."""
        if self._active > self._config.queue:
            raise RefusedError(429, f"the queue of {self._config.queue} requests is full; try again later", code="queue_full")
        self._active += 1
        try:
            async with self._turn:
                yield
        finally:
            self._active -= 1

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _read(self, request: HttpRequest, shape: type[T]) -> T:
        """The request body as `shape`; RefusedError if it is invalid."""
        self._check_key(request)
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if content_type != "application/json":
            raise RefusedError(
                415, f"Content-Type: expected application/json, got {content_type!r}", code="invalid_content_type"
            )
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                raise RefusedError(413, f"body: expected at most {MAX_BYTES} bytes, got more", code="too_large")
        try:
            return shape.model_validate_json(bytes(body))  # type: ignore[attr-defined,no-any-return]  # both are pydantic models
        except ValidationError as error:
            raise RefusedError.of(400, validation_error(error)) from None

    def _check_key(self, request: HttpRequest) -> None:
        key = self._config.api_key
        given = request.headers.get("authorization", "").encode()
        if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            message = "Authorization: expected the API key that this server was started with, got another or none"
            raise RefusedError(401, message, code="invalid_api_key")

    def _model(self, name: str | None) -> tuple[str, "ChatSession"]:
        chosen = next(iter(self._models)) if name is None else name
        if chosen not in self._models:
            message = f"model: expected one of {', '.join(self._models)}, got {name!r}"
            raise RefusedError(404, message, code="model_not_found", param="model")
        return chosen, self._models[chosen]


class Stream(StreamingResponse):
    """Server-sent events that release their turn however they end, even if the client disconnects before the first."""

    def __init__(self, events: AsyncGenerator[str, None], turn: contextlib.AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._events, self._turn = events, turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._turn.aclose()


def _refusing(work: Callable[[], T]) -> T:
    """What `work` returns; what it finds wrong with the request is refused."""
    from llm.errors import InputError

    try:
        return work()
    except InputError as error:
        field = str(error).partition(":")[0]
        param = PARAMETERS.get(field, field) if field.isidentifier() else None
        raise RefusedError(400, str(error), code="invalid_value", param=param) from error


def _logprobs(session: "ChatSession", parsed: ChatRequest | CompletionRequest, *, chat: bool) -> TokenLogprobs | None:
    return None if parsed.likeliest is None else TokenLogprobs(session.tokenizer, chat=chat)


def _close(answer: "Answer") -> None:
    if isinstance(answer.pieces, Generator):
        answer.pieces.close()


def _usage(replies: list[Reply], parsed: ChatRequest | CompletionRequest) -> dict[str, int]:
    """Token counts: each prompt once, and all answers."""
    prompts = sum(reply.answer.prompt_tokens for reply in replies[:: parsed.n or 1])
    return usage(prompts, sum(reply.answer.new_tokens for reply in replies))


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _refuse(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"Retry-After": "5"} if error.status == 429 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _http_fault(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        error_body(f"{request.method} {request.url.path}: {error.detail}", code="not_found"), error.status_code
    )


async def _unexpected(request: HttpRequest, error: Exception) -> Response:
    return JSONResponse(error_body(f"{type(error).__name__}: {error}", code="internal_error"), status_code=500)

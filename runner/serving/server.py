"""A server for models that one talks to: a page for people, and endpoints as OpenAI's clients know them.

One answer is written at a time, by one thread that owns the models; others wait in a queue of bounded length. An answer whose
reader has gone is given up. Nothing is kept of what is said.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runner.serving.openai_api import ChatRequest, CompletionRequest, Shape, fault, usage

if TYPE_CHECKING:
    from llm.inference.chat_session import Answer, ChatSession
    from llm.inference.sampling import Sampling

PAGE = Path(__file__).parents[1] / "pages" / "talk.html"
MOST_BYTES = 1 << 20  # of a request
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a server behaves where a request says nothing."""

    sampling: "Sampling"
    max_new_tokens: int
    queue: int = 16  # answers that may wait
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")  # names it answers to; ("*",) for all
    api_key: str | None = None


class RefusedError(Exception):
    """A request that gets no answer."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, fault(message, code=code, param=param)


class Server:
    """The models by name, and the queue before them."""

    def __init__(self, models: Mapping[str, "ChatSession"], settings: Settings) -> None:
        self._models, self._settings = dict(models), settings
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="speaker")
        self._turn = asyncio.Semaphore(1)
        self._inside = 0  # answers that are written or wait

    def app(self) -> Starlette:
        """As an ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {RefusedError: _refuse, HTTPException: _http_fault, Exception: _unexpected}
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(self._settings.hosts), www_redirect=False)
        return Starlette(routes=routes, middleware=[trusted], exception_handlers=handlers)

    async def page(self, request: HttpRequest) -> Response:
        """The page."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        return FileResponse(PAGE, media_type="text/html", headers={"Content-Security-Policy": policy})

    async def health(self, request: HttpRequest) -> Response:
        """Whether it lives, and how many answers are written or wait."""
        return JSONResponse({"status": "ok", "answers": self._inside})

    async def models(self, request: HttpRequest) -> Response:
        """`GET /v1/models`."""
        self._check_key(request)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "stockpot", "context": speaker.context}
            for name, speaker in self._models.items()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request: HttpRequest) -> Response:
        """`POST /v1/chat/completions`."""
        asked = await self._read(request, ChatRequest)
        name, speaker = self._model(asked.model)
        if not speaker.chats:
            raise RefusedError(
                400, f"the model {name!r} has no chat template; use /v1/completions", code="no_chat", param="model"
            )
        messages = [message.plain for message in asked.messages]
        if messages[-1]["role"] != "user":
            raise RefusedError(400, "messages: expected the user's turn last", code="invalid_value", param="messages")

        def begin(options: dict[str, Any]) -> "Answer":
            return speaker.answer(messages, **options)

        return await self._respond(request, asked, begin, Shape(model=name, chat=True))

    async def complete(self, request: HttpRequest) -> Response:
        """`POST /v1/completions`."""
        asked = await self._read(request, CompletionRequest)
        name, speaker = self._model(asked.model)

        def begin(options: dict[str, Any]) -> "Answer":
            return speaker.continuation(asked.prompt, **options)

        return await self._respond(request, asked, begin, Shape(model=name, chat=False))

    async def _respond(
        self,
        request: HttpRequest,
        asked: ChatRequest | CompletionRequest,
        begin: Callable[[dict[str, Any]], "Answer"],
        shape: Shape,
    ) -> Response:
        """Waits for a turn, begins the answer, and hands it out whole or in pieces."""
        options = {
            "max_new_tokens": asked.wanted_tokens or self._settings.max_new_tokens,
            "sampling": self._sampling(asked),
            "stop": asked.stops,
        }
        turn = contextlib.AsyncExitStack()
        await turn.enter_async_context(self._turn_of(request))
        try:
            answer = await self._call(lambda: _begun(begin, options))
        except BaseException:
            await turn.aclose()
            raise
        if asked.stream:
            wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = self._events(answer, shape, wants_usage=wants_usage)
            return Stream(events, turn)
        async with turn, contextlib.aclosing(self._pieces(answer, request)) as made:
            pieces = [piece async for piece in made]
        counted = usage(answer.prompt_tokens, answer.new_tokens)
        return JSONResponse(shape.whole("".join(pieces), reason=_reason(answer), usage=counted))

    async def _events(self, answer: "Answer", shape: Shape, *, wants_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events."""
        try:
            first = True
            async with contextlib.aclosing(self._pieces(answer)) as pieces:
                async for piece in pieces:
                    yield _event(shape.piece(piece, first=first))
                    first = False
            yield _event(shape.piece(None, reason=_reason(answer)))
            if wants_usage:
                yield _event(shape.usage(usage(answer.prompt_tokens, answer.new_tokens)))
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already: the stream itself has to say it
            yield _event(fault(f"{type(error).__name__}: {error}", code="internal_error"))

    async def _pieces(self, answer: "Answer", request: HttpRequest | None = None) -> AsyncGenerator[str, None]:
        """The pieces, each made in the models' thread; given up where the reader of `request` has gone."""
        try:
            while (piece := await self._call(lambda: next(answer.pieces, None))) is not None:
                yield piece
                if request is not None and await request.is_disconnected():
                    raise RefusedError(499, "the reader has gone", code="gone")
        finally:
            await asyncio.shield(self._call(lambda: _close(answer)))

    @contextlib.asynccontextmanager
    async def _turn_of(self, request: HttpRequest) -> AsyncIterator[None]:
        """One's turn at the models; RefusedError where too many wait already."""
        if self._inside > self._settings.queue:
            raise RefusedError(429, f"{self._settings.queue} answers wait already; try again later", code="queue_full")
        self._inside += 1
        try:
            async with self._turn:
                yield
        finally:
            self._inside -= 1

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _read(self, request: HttpRequest, shape: type[T]) -> T:
        """The body as `shape`; RefusedError says what is wrong with it."""
        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RefusedError(415, "expected a body of the type application/json", code="invalid_content_type")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                raise RefusedError(413, f"expected a body of at most {MOST_BYTES} bytes", code="too_large")
        try:
            return shape.model_validate_json(bytes(body))  # type: ignore[attr-defined,no-any-return]  # both are pydantic models
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RefusedError(400, f"{where or 'body'}: {first['msg']}", code="invalid_value", param=where or None) from None

    def _check_key(self, request: HttpRequest) -> None:
        wanted = self._settings.api_key
        if wanted is not None and request.headers.get("authorization") != f"Bearer {wanted}":
            raise RefusedError(401, "expected the API key that this server was started with", code="invalid_api_key")

    def _model(self, name: str | None) -> tuple[str, "ChatSession"]:
        chosen = next(iter(self._models)) if name is None else name
        if chosen not in self._models:
            there = ", ".join(self._models)
            raise RefusedError(404, f"found no model {name!r}; there are: {there}", code="model_not_found", param="model")
        return chosen, self._models[chosen]

    def _sampling(self, asked: ChatRequest | CompletionRequest) -> "Sampling":
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "seed")
            if (value := getattr(asked, name)) is not None
        }
        return replace(self._settings.sampling, **given, repetition_penalty=asked.repetition_penalty)


class Stream(StreamingResponse):
    """Server-sent events that give their turn back however they end, also where the reader has gone before they began."""

    def __init__(self, events: AsyncGenerator[str, None], turn: contextlib.AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._events, self._turn = events, turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._turn.aclose()


def _begun(begin: Callable[[dict[str, Any]], "Answer"], options: dict[str, Any]) -> "Answer":
    from llm.errors import InputError

    try:
        return begin(options)
    except InputError as error:
        raise RefusedError(400, str(error), code="invalid_value") from error


def _close(answer: "Answer") -> None:
    close = getattr(answer.pieces, "close", None)
    if close is not None:
        close()


def _reason(answer: "Answer") -> str:
    return "length" if answer.is_cut else "stop"


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _refuse(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"Retry-After": "5"} if error.status == 429 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _http_fault(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(fault(f"{request.method} {request.url.path}: {error.detail}", code="not_found"), error.status_code)


async def _unexpected(request: HttpRequest, error: Exception) -> Response:
    return JSONResponse(fault(f"{type(error).__name__}: {error}", code="internal_error"), status_code=500)

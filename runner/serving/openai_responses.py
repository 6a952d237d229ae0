"""The responses of the OpenAI-compatible endpoints: whole answers, pieces of streams, errors."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from runner.serving.tool_calls import Call

if TYPE_CHECKING:
    from llm.inference.token_report import TokenReport
    from llm.tokenizer.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Finished:
    """One whole answer to a request."""

    text: str
    reason: str
    calls: Sequence[Call] = ()
    logprobs: Mapping[str, Any] | None = None
    reasoning: str = ""


class Responses:
    """The responses to one request, whole or streamed, to a chat or a completion."""

    def __init__(self, *, model: str, chat: bool, wants_usage: bool = False) -> None:
        self._chat, self._wants_usage = chat, wants_usage
        name = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model, "system_fingerprint": None}
        self._whole = {"object": name, **head}
        self._piece = {"object": f"{name}.chunk" if chat else name, **head}

    def whole(self, answers: Sequence[Finished], usage: Mapping[str, int]) -> dict[str, Any]:
        """The answers in one piece."""
        choices = []
        for index, answer in enumerate(answers):
            content: dict[str, Any] = {"text": answer.text}
            if self._chat:
                text = None if answer.calls and not answer.text.strip() else answer.text
                message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
                if answer.reasoning:
                    message["reasoning_content"] = answer.reasoning  # as vLLM, llama.cpp and DeepSeek call it
                if answer.calls:
                    message["tool_calls"] = [call.shown for call in answer.calls]
                content = {"message": message}
            choices.append({"index": index, **content, "logprobs": answer.logprobs, "finish_reason": answer.reason})
        return {**self._whole, "choices": choices, "usage": usage}

    def begin(self, index: int) -> dict[str, Any] | None:
        """The first piece of an answer, which names the role; a completion has none."""
        return self._made(index, {"delta": {"role": "assistant", "content": ""}}) if self._chat else None

    def text(
        self, index: int, text: str, logprobs: Mapping[str, Any] | None = None, *, field: str = "content"
    ) -> dict[str, Any]:
        """A piece of an answer's text, or of another field of its message."""
        return self._made(index, {"delta": {field: text}} if self._chat else {"text": text}, logprobs=logprobs)

    def calls(self, index: int, calls: Sequence[Call]) -> dict[str, Any]:
        """The calls of an answer, in one piece."""
        shown = [{"index": place, **call.shown} for place, call in enumerate(calls)]
        return self._made(index, {"delta": {"tool_calls": shown}})

    def end(self, index: int, reason: str) -> dict[str, Any]:
        """The end of an answer."""
        return self._made(index, {"delta": {}} if self._chat else {"text": ""}, reason=reason)

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last piece of a stream with token counts."""
        return {**self._piece, "choices": [], "usage": usage}

    def _made(
        self, index: int, content: Mapping[str, Any], *, reason: str | None = None, logprobs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._piece, "choices": [choice], **({"usage": None} if self._wants_usage else {})}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class TokenLogprobs:
    """The log-probabilities of an answer's tokens as the two endpoints show them, part by part."""

    def __init__(self, tokenizer: "TextTokenizer", *, chat: bool) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._special = frozenset(tokenizer.special_tokens)
        self._shown, self._spelled = 0, b""  # tokens so far, and their text

    def shown(self, reports: "Sequence[TokenReport]", text_size: int) -> dict[str, Any]:
        """The next of an answer's tokens: those that its first `text_size` characters have something of.

        So there are none of the end token, and none that a stop text cuts off.
        """
        ready, offsets = [], []
        while self._shown < len(reports) and (offset := len(self._spelled.decode(errors="ignore"))) < text_size:
            report = reports[self._shown]
            ready.append(report)
            offsets.append(offset)
            if self._tokenizer.piece(report.token) not in self._special:
                self._spelled += self._bytes(report.token)
            self._shown += 1
        return self._of_chat(ready) if self._chat else self._of_completion(ready, offsets)

    def _of_chat(self, reports: "Sequence[TokenReport]") -> dict[str, Any]:
        content = []
        for report in reports:
            top = [self._entry(token, score) for token, score in report.likeliest]
            content.append({**self._entry(report.token, report.log_probability), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _of_completion(self, reports: "Sequence[TokenReport]", offsets: Sequence[int]) -> dict[str, Any]:
        return {
            "tokens": [self._text(report.token) for report in reports],
            "token_logprobs": [report.log_probability for report in reports],
            "top_logprobs": [{self._text(token): score for token, score in report.likeliest} for report in reports],
            "text_offset": list(offsets),
        }

    def _entry(self, token: int, score: float) -> dict[str, Any]:
        return {"token": self._text(token), "logprob": score, "bytes": list(self._bytes(token))}

    def _text(self, token: int) -> str:
        spelled = self._bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:  # OpenAI's form of a part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _bytes(self, token: int) -> bytes:
        from llm.inference.token_report import token_bytes

        return token_bytes(self._tokenizer, token)


def error_body(message: str, *, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The body of an error response."""
    kinds = {"internal_error": "server_error", "queue_full": "rate_limit_error"}
    return {
        "error": {"message": message, "type": kinds.get(code or "", "invalid_request_error"), "param": param, "code": code}
    }


def validation_error(error: ValidationError) -> dict[str, Any]:
    """The body of the response to a request that does not fit, as OpenAI words it."""
    found = error.errors(include_url=False, include_input=False)
    of_field = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    # Of the branches of a union, the one that fits best: whose type is right, or of which most is.
    first = min(of_field, key=lambda one: (one["type"].endswith("_type"), -len(one["loc"])))
    place = ""
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "bool", "float"):  # else a branch of a union
            place += f".{part}" if place else part
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    match first["type"]:
        case "extra_forbidden":
            return error_body(f"Unknown parameter: '{place}'.", code="unknown_parameter", param=place)
        case "missing":
            return error_body(f"Missing required parameter: '{place}'.", code="missing_required_parameter", param=place)
        case "none_required":
            return error_body(f"{place}: this server does not support it", code="unsupported_parameter", param=place)
        case "value_error":  # raised above, where the message begins with the field
            name = message.partition(":")[0]
            place = ".".join(filter(None, (place, name)))
            return error_body(f"{place}:{message.partition(':')[2]}", code="invalid_value", param=place)
    return error_body(f"{place or 'body'}: {message}", code="invalid_value", param=place or None)

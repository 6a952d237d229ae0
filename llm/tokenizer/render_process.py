"""A process that renders the chat templates of others, with bounded time and memory.

Jinja's sandbox keeps a template from reaching Python's internals, but not from looping for ever or filling the memory. A
process can be ended. It reads a JSON object a line from standard input, writes one a line, and ends with its input.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from llm.errors import InputError

SECONDS, SECONDS_PER_CHAT = 0.5, 0.01  # of a core; a usual template takes 0.05 ms for a chat
Rendered = tuple[str, list[tuple[int, int]]]  # the text, and spans of it
MOST_BYTES = 400 * 2**20  # beyond what the process has after its imports


class _Renderer:
    """The process, started when it is first needed and again after a template has ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._guard = threading.Lock()
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer; InputError if the template ends the process."""
        with self._guard:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONSAFEPATH": "1"},
                )
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = b""
            if not line.endswith(b"\n"):
                self.close()
                raise InputError("the chat template takes too much time or memory to render a chat")
            answer: dict[str, Any] = json.loads(line)
            return answer

    def close(self) -> None:
        """Ends the process."""
        if (process := self._process) is not None:
            self._process = None
            process.kill()
            process.communicate()


_renderer = cache(_Renderer)


def render_apart(
    requests: Sequence[Mapping[str, Any]], template: str, special_tokens: Mapping[str, str], *, marked: bool
) -> list[Rendered | InputError]:
    """`render_here` in the process; InputError if the template takes too much."""
    answer = _renderer().ask({"requests": requests, "template": template, "tokens": dict(special_tokens), "marked": marked})
    if "refused" in answer:
        raise _refusal(answer["refused"])
    return [
        _refusal(found) if isinstance(found, str) else (found[0], [(first, last) for first, last in found[1]])
        for found in answer["rendered"]
    ]


def render_here(
    requests: Sequence[Mapping[str, Any]], template: str, special_tokens: Mapping[str, str], *, marked: bool
) -> list[Rendered | InputError]:
    """The texts of chats, and with `marked` the spans between `{% generation %}` and `{% endgeneration %}`.

    A request has `messages`, and may have `tools` and `options`, which are further variables. In place of a chat that the
    template refuses stands an error.
    """
    return [
        _refusal(found) if isinstance(found, str) else found
        for found in _rendered(requests, template, special_tokens, marked=marked)
    ]


def _rendered(
    requests: Sequence[Mapping[str, Any]], template: str, special_tokens: Mapping[str, str], *, marked: bool
) -> list[Rendered | str]:
    """Of each request the text and the spans, or why the template refuses it."""
    found: dict[int, Rendered | str] = {}
    alike: dict[str, list[int]] = {}  # requests of which only the messages differ are rendered together, which is faster
    for number, request in enumerate(requests):
        alike.setdefault(repr([request.get("options"), request.get("tools")]), []).append(number)
    for numbers in alike.values():
        together = _render([requests[number] for number in numbers], template, special_tokens, marked=marked)
        if isinstance(together, str):  # it does not say of which
            for number in numbers:
                alone = _render([requests[number]], template, special_tokens, marked=marked)
                found[number] = alone if isinstance(alone, str) else alone[0]
        else:
            found.update(zip(numbers, together, strict=True))
    return [found[number] for number in range(len(requests))]


def _render(
    requests: Sequence[Mapping[str, Any]], template: str, special_tokens: Mapping[str, str], *, marked: bool
) -> list[Rendered] | str:
    """The texts and spans of requests with equal options and tools, or why the template refuses one of them."""
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils  # takes half a second to import

    render: Any = chat_template_utils.render_jinja_template  # annotated as returning one string
    try:
        texts, spans = render(
            conversations=[request["messages"] for request in requests],
            tools=requests[0].get("tools"),
            chat_template=template,
            return_assistant_tokens_mask=marked,
            **special_tokens,
            **requests[0].get("options", {}),
        )
    except (MemoryError, TimeoutError):
        raise
    except TemplateError as error:  # its own words, by raise_exception or of its syntax
        return str(error)[:1000]
    except Exception as error:  # whatever a template makes of Python's values
        return f"{type(error).__name__}: {str(error)[:1000]}"
    found: list[Any] = list(spans) or [[] for _ in texts]
    return list(zip(texts, found, strict=True))


def _refusal(why: str) -> InputError:
    return InputError(f"the chat template refuses this chat: {why}")


def main() -> None:
    """Answers requests until the input ends."""
    from transformers.utils import chat_template_utils  # noqa: F401 - before its memory is measured

    signal.signal(signal.SIGPROF, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    mapped = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 2**32
    )
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, hard))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        seconds = SECONDS + SECONDS_PER_CHAT * len(request["requests"])
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + seconds) + 1  # where no signal is looked at
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            found = _rendered(request["requests"], request["template"], request["tokens"], marked=request["marked"])
            answer: dict[str, Any] = {"rendered": found}
        except MemoryError:
            answer = {"refused": "it takes too much memory"}
        except TimeoutError as error:
            answer = {"refused": str(error)}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _stop(signal_number: int, frame: Any) -> NoReturn:
    raise TimeoutError("it takes too much time")


if __name__ == "__main__":
    main()

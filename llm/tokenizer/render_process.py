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
    chats: Sequence[Any], template: str, special_tokens: Mapping[str, str], **options: Any
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """What Transformers' `render_jinja_template` returns; InputError if the template refuses a chat, or takes too much."""
    request = {"chats": [list(map(dict, chat)) for chat in chats], "template": template, "tokens": dict(special_tokens)}
    answer = _renderer().ask(request | {"options": options})
    if "refused" in answer:
        raise InputError(f"the chat template refuses this chat: {answer['refused']}")
    return answer["texts"], [[(first, last) for first, last in spans] for spans in answer["spans"]]


def main() -> None:
    """Answers requests until the input ends."""
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils

    signal.signal(signal.SIGPROF, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    mapped = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 2**32
    )
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, hard))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        seconds = SECONDS + SECONDS_PER_CHAT * len(request["chats"])
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + seconds) + 1  # where no signal is looked at
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = _answer(chat_template_utils.render_jinja_template, request)
        except MemoryError:
            answer = {"refused": "it takes too much memory"}
        except TemplateError as error:  # its own words, by raise_exception or of its syntax
            answer = {"refused": str(error)[:1000]}
        except Exception as error:  # whatever a template makes of Python's values
            answer = {"refused": f"{type(error).__name__}: {str(error)[:1000]}"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(render: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    options = request["options"]
    texts, spans = render(conversations=request["chats"], chat_template=request["template"], **options, **request["tokens"])
    return {"texts": texts, "spans": spans or []}


def _stop(signal_number: int, frame: Any) -> NoReturn:
    raise TimeoutError("it takes too much time")


if __name__ == "__main__":
    main()

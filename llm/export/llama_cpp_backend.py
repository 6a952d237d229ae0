"""A GGUF file in llama.cpp, as a backend of `llm.export.parity`.

llama.cpp comes with the package xllamacpp and serves on the loopback interface of a process of its own. Keys and values are in
f32 and flash attention is off: with llama.cpp's default cache in f16, greedy text diverges from the model's.
"""

import http
import http.client
import json
import socket
import urllib.parse
import weakref
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.errors import InputError
from llm.export.llama_cpp_process import LlamaCppProcess
from llm.tokenizer.tokenizer import ChatMessage

PACKAGE = "xllamacpp"
TEMPLATE_SECONDS = 10.0  # to render a chat
LIKELIEST = 1000  # tokens whose log-probabilities are requested per position; a reply with all of 50,000 takes megabytes


class _Connection(http.client.HTTPConnection):
    """Sends small requests at once."""

    def connect(self) -> None:
        super().connect()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class LlamaCppBackend:
    """A model in llama.cpp; InputError if it does not open the file."""

    def __init__(self, path: Path, *, name: str, context: int, vocab_size: int, ends: Sequence[int], threads: int = 1) -> None:
        """`context` is the longest sequence; `ends` are the tokens that end an answer; `name` is for messages."""
        self.name = name
        self._process = LlamaCppProcess(path, context=context, threads=threads)
        self._netloc = urllib.parse.urlsplit(self._process.address).netloc
        self._connection = _Connection(self._netloc)
        weakref.finalize(self, self._connection.close)
        self._vocab_size, self._ends = vocab_size, frozenset(ends)
        self._whole = self.encode("a")[0]  # a token of whole characters

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; the characters of special tokens are plain text."""
        tokens: list[int] = self._ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]
        return tokens

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The tokens of a chat up to where the assistant answers, rendered by the template in the file."""
        prompt = self._rendered(messages)
        tokens: list[int] = self._ask("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
        return tokens

    def _rendered(self, messages: Sequence[ChatMessage]) -> str:
        """A chat by the template in the file; InputError if that takes too long, or ends the process."""
        apart = _Connection(self._netloc, timeout=TEMPLATE_SECONDS)
        try:
            apart.request(*_message("/apply-template", messages=list(messages)))
            return str(_content("/apply-template", apart.getresponse())["prompt"])
        except (TimeoutError, http.client.RemoteDisconnected, ConnectionError) as error:
            self._process.close()
            raise InputError("the chat template takes too much time or memory in llama.cpp") from error
        finally:
            apart.close()

    def encode_chat(self, messages: Sequence[ChatMessage]) -> None:
        """None: llama.cpp renders chats only up to an answer."""

    def log_probabilities(self, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token after `tokens`, (1, V); NaN for all but the LIKELIEST."""
        wanted = min(LIKELIEST, self._vocab_size)
        # A chosen end token, or one that ends inside a character, would have no entry, so the bias makes another the choice.
        # The reported log-probabilities are those before the bias.
        reply = self._complete(tokens, n_predict=1, n_probs=wanted, logit_bias=[[self._whole, 1e9]])
        (position,) = reply["completion_probabilities"]
        found = torch.full((1, self._vocab_size), torch.nan)
        for entry in position["top_logprobs"]:
            found[0, entry["id"]] = entry["logprob"]
        return found

    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens after each prompt, without the end token."""
        written = (self._complete(prompt, n_predict=max_new_tokens)["tokens"] for prompt in prompts)
        return [list(takewhile(lambda token: token not in self._ends, tokens)) for tokens in written]

    def written(self, prompt: Sequence[int], *, count: int) -> list[int]:
        """`count` greedy tokens after a prompt, whatever ends an answer."""
        tokens: list[int] = self._complete(prompt, n_predict=count, ignore_eos=True)["tokens"]
        return tokens

    def _complete(self, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
        greedy = {"temperature": 0, "repeat_penalty": 1.0}  # whatever the defaults in the file are
        return self._ask("/completion", prompt=list(prompt), return_tokens=True, cache_prompt=False, **greedy, **options)

    def _ask(self, path: str, **fields: Any) -> dict[str, Any]:
        message = _message(path, **fields)
        try:
            self._connection.request(*message)
            reply = self._connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):  # it closes a connection after 100 requests, or when idle
            self._connection.close()
            self._connection.request(*message)
            reply = self._connection.getresponse()
        return _content(path, reply)


def _message(path: str, **fields: Any) -> tuple[str, str, bytes, dict[str, str]]:
    return "POST", path, json.dumps(fields).encode(), {"Content-Type": "application/json"}


def _content(path: str, reply: http.client.HTTPResponse) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reply.read() or b"{}")
    if reply.status != http.HTTPStatus.OK:
        raise InputError(f"llama.cpp refuses {path}: {found.get('error', {}).get('message', reply.reason)}")
    return found

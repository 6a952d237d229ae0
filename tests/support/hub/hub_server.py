"""A Hugging Face Hub on a loopback port, with the routes that `huggingface_hub` 2.4 uses without Xet, and faults on demand.

whoami, create a repository, validate a card, preupload, LFS batch, PUT and verify, commit (onto a parent, as a pull request),
branches and tags; model info, refs, commits, tree, paths and download, of ranges too; tree and download of datasets.
`Hub.requests` lists the requests in order; `Hub.faults`, `fault_at` and `fault_in` choose the faults.
"""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import hub_reading
import hub_writing
import pytest
from hub_state import (
    OTHER,
    OTHER_TOKEN,
    OWNER,
    SIGNATURE,
    TOKEN,
    Commit,
    Fault,
    File,
    Hub,
    RefusedError,
    Reply,
    Repository,
    Request,
    routes,
)

__all__ = [
    "OTHER", "OTHER_TOKEN", "OWNER", "SIGNATURE", "TOKEN", "Commit", "Fault", "File", "Hub", "Repository", "hub_reading",
    "hub_writing", "serve", "use",
]  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        parts = urlsplit(self.path)
        fault, size = self._fault(f"{method} {parts.path}"), int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size // 2 if fault.ends == "body" else size)
        if fault.status is not None:
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            return self._send(fault.status, Reply({"error": "not now"}, headers=headers))
        if fault.ends in ("body", "work"):
            return self._hang_up()
        secret = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.hub.lock:
            self.hub.requests.append(" ".join(filter(None, [self.command, unquote(parts.path), self.headers.get("Range")])))
            request = Request(self.hub, self.hub.users.get(secret), parse_qs(parts.query), body)
            try:
                status, reply = HTTPStatus.OK, self._reply(method, parts.path, request)
            except RefusedError as refused:
                headers = {"X-Error-Code": refused.code} if refused.code else {}
                status, reply = refused.status, Reply(refused.body, headers=headers)
        if fault.ends == "answer":
            return self._hang_up()
        return self._send(status, reply, whole=not fault.ends)

    def _fault(self, line: str) -> Fault:
        """The fault of the current request."""
        with self.hub.lock:
            number, self.hub.arrived = self.hub.arrived, self.hub.arrived + 1
            waiting = next((faults for part, faults in self.hub.fault_in.items() if part in line and faults), None)
            return waiting.pop(0) if waiting else self.hub.fault_at.pop(number, Fault())

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _reply(self, method: str, path: str, request: Request) -> Reply:
        for requested, pattern, answer in routes:
            if requested == method and (match := pattern.fullmatch(path)):
                return answer(request, **{name: unquote(part) for name, part in match.groupdict().items()})
        raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, error=f"this Hub does not know {method} {path}")

    def _send(self, status: HTTPStatus, reply: Reply, *, whole: bool = True) -> None:
        data = reply.file.data if reply.file else json.dumps(reply.value).encode()
        if reply.file and (requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            status, size = HTTPStatus.PARTIAL_CONTENT, len(data)
            begin, end = int(requested[1]), min(int(requested[2] or size), size - 1)
            data = data[begin : end + 1]
            reply.headers["Content-Range"] = f"bytes {begin}-{end}/{size}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if reply.file else "application/json")
        if reply.file:
            self.send_header("ETag", f'"{reply.file.etag}"')
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            breaks_after = reply.breaks_after if whole else len(data) // 2
            self.wfile.write(data[:breaks_after])
            self.close_connection = breaks_after is not None

    def log_message(self, format: str, *args: Any) -> None:
        pass


def use(hub: Hub, patch: pytest.MonkeyPatch, home: Path) -> None:
    """Makes `hub` the Hub of this process and its children, logged in and without waits."""
    client = "huggingface_hub.constants"  # patched before the environment, since importing it reads that
    patch.setattr(f"{client}.ENDPOINT", hub.url)
    patch.setattr(f"{client}.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(f"{client}.HF_HUB_DISABLE_XET", True)  # this Hub has no Xet store
    patch.setattr(f"{client}.HF_HUB_CACHE", str(home / "hf-home" / "hub"))
    patch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    variables = {"ENDPOINT": hub.url, "TOKEN": TOKEN, "TOKEN_PATH": str(home / "no-token"), "HOME": str(home / "hf-home")}
    for name, value in variables.items():
        patch.setenv(f"HF_{name}", value)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A new Hub on a free port during the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()

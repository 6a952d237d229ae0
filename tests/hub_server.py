"""A Hugging Face Hub on a loopback port, as far as `huggingface_hub` 2.4 asks for it without Xet.

whoami, create a repository, validate a card, preupload, LFS batch, PUT and verify, commit; model info, tree and download,
of ranges too. State is in memory: repositories hold commits, a commit holds files. `requests` lists what was asked, in order;
`faults` says what goes wrong with the next downloads of a file.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER, TOKEN = "ada", "hf_secret_of_ada"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
NO_PARENT = "0" * 40


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A revision of a repository."""

    oid: str
    summary: str
    files: dict[str, File]


@dataclass
class Repository:
    """Commits by id, and branches that point at one."""

    private: bool
    gated: bool = False  # everybody sees that it is there; only its owner gets its files
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, branch: str, summary: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch, NO_PARENT)
        listing = "".join(f"{name}\0{file.git_oid}\n" for name, file in sorted(files.items()))
        oid = hashlib.sha1(f"{parent}\n{summary}\n{len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, summary, files)
        self.branches[branch] = oid
        return self.commits[oid]


class RefusedError(Exception):
    """Ends a request with an error; `code` is what the client tells errors apart by."""

    def __init__(self, status: HTTPStatus, code: str = "", **body: Any) -> None:
        self.status, self.code, self.body = status, code, body


class Hub:
    """What the server knows."""

    def __init__(self) -> None:
        self.url = ""
        self.users = {TOKEN: OWNER}
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # large files by sha256, committed or not
        self.requests: list[str] = []  # "POST /api/repos/create", "GET /ada/m/resolve/.../f bytes=7-"
        self.faults: dict[str, list[int | HTTPStatus]] = {}  # by file: bytes until the connection breaks, or a refusal
        self.lock = threading.Lock()


@dataclass(frozen=True)
class Request:
    """One request, taken apart."""

    hub: Hub
    user: str | None
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def repository(self, repo: str, *, write: bool = False) -> Repository:
        """The repository, if it is there and the user may see (or change) it."""
        found = self.hub.repositories.get(repo)
        owner = repo.partition("/")[0]
        if found is None or (found.private and self.user != owner):
            raise RefusedError(HTTPStatus.NOT_FOUND, "RepoNotFound")
        if write and self.user != owner:
            raise RefusedError(HTTPStatus.FORBIDDEN)
        return found

    def commit(self, repo: str, revision: str) -> Commit:
        found = self.repository(repo).at(revision)
        if found is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return found


@dataclass(frozen=True)
class Reply:
    """JSON, or a file."""

    value: Any = None
    file: File | None = None
    breaks_after: int | None = None  # bytes
    headers: dict[str, str] = field(default_factory=dict)


Answer = Callable[..., Reply]
_routes: list[tuple[str, re.Pattern[str], Answer]] = []


def route(method: str, path: str) -> Callable[[Answer], Answer]:
    """Registers a function for a method and a path; {name} matches a segment, {repo} two and {path} the rest."""
    forms = {"repo": "[^/]+/[^/]+?", "path": ".+"}
    pattern = re.sub(r"\{(\w+)\}", lambda match: f"(?P<{match[1]}>{forms.get(match[1], '[^/]+')})", path)

    def register(answer: Answer) -> Answer:
        _routes.append((method, re.compile(pattern), answer))
        return answer

    return register


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Reply:
    if request.user is None:
        raise RefusedError(HTTPStatus.UNAUTHORIZED, error="Invalid username or password.")
    return Reply({"type": "user", "name": request.user, "orgs": [], "auth": {"type": "access_token"}})


@route("POST", "/api/repos/create")
def create(request: Request) -> Reply:
    if request.user is None:
        raise RefusedError(HTTPStatus.UNAUTHORIZED, error="Invalid username or password.")
    wanted = request.json
    owner = wanted["organization"] or request.user
    if owner != request.user:
        raise RefusedError(HTTPStatus.FORBIDDEN, error=f"You don't have the rights to create a model under {owner}")
    repo = f"{owner}/{wanted['name']}"
    answer = {"url": f"{request.hub.url}/{repo}", "name": repo}
    if repo in request.hub.repositories:
        raise RefusedError(HTTPStatus.CONFLICT, error="You already created this model repo", **answer)
    request.hub.repositories[repo] = repository = Repository(private=wanted.get("visibility") == "private")
    repository.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
    return Reply(answer)


@route("POST", "/api/validate-yaml")
def validate(request: Request) -> Reply:
    card = request.json["content"]
    if not re.match(r"---\n.*?\n---\n", card, re.DOTALL):
        raise RefusedError(HTTPStatus.BAD_REQUEST, errors=[{"message": "the card has no metadata"}], warnings=[])
    return Reply({"errors": [], "warnings": []})


@route("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(request: Request, repo: str, revision: str) -> Reply:
    request.repository(repo, write=True)
    request.commit(repo, revision)
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
            "shouldIgnore": False,
        }
        for file in request.json["files"]
    ]
    return Reply({"files": modes})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(request: Request, repo: str) -> Reply:
    request.repository(repo, write=True)
    objects = []
    for wanted in request.json["objects"]:
        upload = {"href": f"{request.hub.url}/lfs/{wanted['oid']}"}
        verify = {"href": f"{request.hub.url}/lfs/{wanted['oid']}/verify"}
        known = wanted["oid"] in request.hub.blobs
        objects.append(wanted if known else {**wanted, "actions": {"upload": upload, "verify": verify}})
    return Reply({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{oid}")
def lfs_put(request: Request, oid: str) -> Reply:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise RefusedError(HTTPStatus.BAD_REQUEST, error="the bytes are not those of the oid")
    request.hub.blobs[oid] = request.body
    return Reply({})


@route("POST", "/lfs/{oid}/verify")
def lfs_verify(request: Request, oid: str) -> Reply:
    if len(request.hub.blobs.get(oid, b"")) != request.json["size"]:
        raise RefusedError(HTTPStatus.NOT_FOUND, error="not uploaded")
    return Reply({})


@route("POST", "/api/models/{repo}/commit/{revision}")
def commit(request: Request, repo: str, revision: str) -> Reply:
    repository = request.repository(repo, write=True)
    files = dict(request.commit(repo, revision).files)
    header: dict[str, Any] = {}
    for line in request.body.splitlines():
        match json.loads(line):
            case {"key": "header", "value": header}:
                if header.get("parentCommit", repository.branches[revision]) != repository.branches[revision]:
                    raise RefusedError(HTTPStatus.PRECONDITION_FAILED, error="A commit has happened since. Please refresh.")
            case {"key": "file", "value": {"path": path, "content": content}}:
                files[path] = File(base64.b64decode(content), lfs=False)
            case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                if oid not in request.hub.blobs:
                    raise RefusedError(HTTPStatus.BAD_REQUEST, error=f"{path} was not uploaded")
                files[path] = File(request.hub.blobs[oid], lfs=True)
            case {"key": "deletedFile", "value": {"path": path}}:
                del files[path]
    made = repository.commit(revision, header["summary"], files)
    return Reply({"commitOid": made.oid, "commitUrl": f"{request.hub.url}/{repo}/commit/{made.oid}", "success": True})


@route("GET", "/api/models/{repo}/revision/{revision}")
def revision_info(request: Request, repo: str, revision: str) -> Reply:
    found = request.commit(repo, revision)
    siblings: list[dict[str, Any]] = [{"rfilename": name} for name in found.files]
    if "blobs" in request.query:
        for sibling in siblings:
            file = found.files[sibling["rfilename"]]
            sibling |= {"size": len(file.data), "blobId": file.git_oid}
            if file.lfs:
                sibling["lfs"] = {"sha256": file.etag, "size": len(file.data), "pointerSize": 130}
    return Reply({"id": repo, "sha": found.oid, "private": request.repository(repo).private, "siblings": siblings})


@route("GET", "/api/models/{repo}/tree/{revision}")
def tree(request: Request, repo: str, revision: str) -> Reply:
    entries = []
    for name, file in request.commit(repo, revision).files.items():
        entry = {"type": "file", "path": name, "size": len(file.data), "oid": file.git_oid}
        lfs = {"oid": file.etag, "size": len(file.data), "pointerSize": 130}
        entries.append({**entry, "lfs": lfs} if file.lfs else entry)
    return Reply(entries)


@route("GET", "/api/models/{repo}/tree/{revision}/{path}")
def folder(request: Request, repo: str, revision: str, path: str) -> Reply:
    """What lies right in a folder."""
    entries: dict[str, dict[str, Any]] = {}
    for name, file in request.commit(repo, revision).files.items():
        if name.startswith(f"{path}/"):
            child = f"{path}/{name.removeprefix(f'{path}/').partition('/')[0]}"
            kind = "file" if child == name else "directory"
            entries[child] = {"type": kind, "path": child, "size": len(file.data), "oid": file.git_oid}
    if not entries:
        raise RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound")
    return Reply(list(entries.values()))


@route("GET", "/api/models/{repo}")
def info(request: Request, repo: str) -> Reply:
    return revision_info(request, repo, "main")


@route("GET", "/{repo}/resolve/{revision}/{path}")
def resolve(request: Request, repo: str, revision: str, path: str) -> Reply:
    found = request.commit(repo, revision)
    if path not in found.files:
        raise RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound")
    if request.repository(repo).gated and request.user != repo.partition("/")[0]:
        raise RefusedError(HTTPStatus.FORBIDDEN, "GatedRepo", error=f"Access to model {repo} is restricted.")
    fault = faults.pop(0) if (faults := request.hub.faults.get(path)) else None
    if isinstance(fault, HTTPStatus):
        raise RefusedError(fault, error="not now")
    return Reply(file=found.files[path], headers={"X-Repo-Commit": found.oid}, breaks_after=fault)


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

    def _answer(self, method: str) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        secret = self.headers.get("Authorization", "").removeprefix("Bearer ")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            self.hub.requests.append(" ".join(filter(None, [self.command, path, self.headers.get("Range")])))
            request = Request(self.hub, self.hub.users.get(secret), parse_qs(parts.query), body)
            try:
                self._send(HTTPStatus.OK, self._reply(method, path, request))
            except RefusedError as refused:
                headers = {"X-Error-Code": refused.code} if refused.code else {}
                self._send(refused.status, Reply(refused.body, headers=headers))

    def _reply(self, method: str, path: str, request: Request) -> Reply:
        for wanted, pattern, answer in _routes:
            if wanted == method and (match := pattern.fullmatch(path)):
                return answer(request, **match.groupdict())
        raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, error=f"this Hub does not know {method} {path}")

    def _send(self, status: HTTPStatus, reply: Reply) -> None:
        data = reply.file.data if reply.file else json.dumps(reply.value).encode()
        if reply.file and (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            status, size, data = HTTPStatus.PARTIAL_CONTENT, len(data), data[int(wanted[1]) :]
            reply.headers["Content-Range"] = f"bytes {wanted[1]}-{size - 1}/{size}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if reply.file else "application/json")
        if reply.file:
            self.send_header("ETag", f'"{reply.file.etag}"')
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: reply.breaks_after])
            self.close_connection = reply.breaks_after is not None

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A fresh Hub that answers on a free port while the block runs."""
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

"""The state of the test Hub (repositories, commits, refs) and its table of routes.

State is in memory. The routes are in `hub_reading` and `hub_writing`, the HTTP server and its faults in `hub_server`.
"""

import datetime
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

OWNER, TOKEN = "ada", "hf_secret_of_ada"
OTHER, OTHER_TOKEN = "grace", "hf_secret_of_grace"
SIGNATURE = "X-Amz-Signature=signed_for_ada"  # in the addresses that large files are sent to
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
NO_PARENT = "0" * 40
FIRST_DAY = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
SHORTEST = 7  # characters of a commit


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        """The git blob id; the blob of a large file is a pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        blob = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """Its entry in listings."""
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid}
        lfs = {"oid": self.etag, "size": len(self.data), "pointerSize": 130}
        return {**entry, "lfs": lfs} if self.lfs else entry


@dataclass(frozen=True)
class Commit:
    """A revision of a repository."""

    oid: str
    summary: str
    files: dict[str, File]
    parent: str = NO_PARENT
    author: str = "system"
    date: datetime.datetime = FIRST_DAY


@dataclass
class Repository:
    """Commits by id, and the branches (pull requests included) and tags that point to them."""

    private: bool
    gated: bool = False  # everybody sees that it is there; only its owner gets its files
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        fitting = [commit for commit in self.commits.values() if commit.oid.startswith(oid)]
        return fitting[0] if len(oid) >= SHORTEST and len(fitting) == 1 else None

    def commit(self, branch: str, summary: str, files: dict[str, File], *, author: str = "system") -> Commit:
        parent = self.branches.get(branch, NO_PARENT)
        listing = "".join(f"{name}\0{file.git_oid}\n" for name, file in sorted(files.items()))
        oid = hashlib.sha1(f"{parent}\n{summary}\n{len(self.commits)}\n{listing}".encode()).hexdigest()
        date = FIRST_DAY + datetime.timedelta(hours=len(self.commits))
        self.commits[oid] = Commit(oid, summary, files, parent, author, date)
        self.branches[branch] = oid
        return self.commits[oid]


class RefusedError(Exception):
    """Ends a request with an error; the client distinguishes errors by `code`."""

    def __init__(self, status: HTTPStatus, code: str = "", **body: Any) -> None:
        self.status, self.code, self.body = status, code, body


@dataclass(frozen=True)
class Fault:
    """The fault of one request: an error status, or a closed connection."""

    status: HTTPStatus | None = None
    retry_after: int | None = None  # seconds, as a header of that status
    ends: str = ""  # in the "body", before the "work", before the "answer", or in the "middle" of the answer


class Hub:
    """The state of the server."""

    def __init__(self) -> None:
        self.url = ""
        self.users = {TOKEN: OWNER, OTHER_TOKEN: OTHER}
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # large files by sha256, committed or not
        self.requests: list[str] = []  # "POST /api/repos/create", "GET /ada/m/resolve/.../f bytes=7-"; those that got through
        self.faults: dict[str, list[int | HTTPStatus]] = {}  # by file: bytes until the connection breaks, or a refusal
        self.arrived = 0  # requests, those that met a fault too
        self.fault_at: dict[int, Fault] = {}  # by number of the request, the first is 0
        self.fault_in: dict[str, list[Fault]] = {}  # by a part of "METHOD /path"; met in order
        self.before_commit: Callable[[Hub], object] | None = None  # a concurrent change right before the next commit
        self.lock = threading.Lock()


@dataclass(frozen=True)
class Request:
    """One parsed request."""

    hub: Hub
    user: str | None
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def repository(self, repo: str, *, write: bool = False) -> Repository:
        """The repository, if it exists and the user may read (or write) it."""
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
routes: list[tuple[str, re.Pattern[str], Answer]] = []


def route(method: str, path: str) -> Callable[[Answer], Answer]:
    """Registers a function for a method and a path; {name} matches a segment, {repo} two and {path} the rest."""
    forms = {"repo": "[^/]+/[^/]+?", "path": ".+"}
    pattern = re.sub(r"\{(\w+)\}", lambda match: f"(?P<{match[1]}>{forms.get(match[1], '[^/]+')})", path)

    def register(answer: Answer) -> Answer:
        routes.append((method, re.compile(pattern), answer))
        return answer

    return register

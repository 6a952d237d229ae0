"""The read routes of the test Hub: info, refs, commits, trees and downloads."""

from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

from hub_state import RefusedError, Reply, Request, route


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Reply:
    if request.user is None:
        raise RefusedError(HTTPStatus.UNAUTHORIZED, error="Invalid username or password.")
    return Reply({"type": "user", "name": request.user, "orgs": [], "auth": {"type": "access_token"}})


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


@route("GET", "/api/models/{repo}/refs")
def refs(request: Request, repo: str) -> Reply:
    found = request.repository(repo)

    def shown(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": oid} for name, oid in refs.items()]

    proposed = {name: oid for name, oid in found.branches.items() if name.startswith("refs/pr/")}
    branches = {name: oid for name, oid in found.branches.items() if name not in proposed}
    answer = {"branches": shown(branches, "refs/heads/"), "converts": [], "tags": shown(found.tags, "refs/tags/")}
    return Reply(answer | ({"pullRequests": shown(proposed, "")} if "include_prs" in request.query else {}))


@route("GET", "/api/models/{repo}/commits/{revision}")
def commits(request: Request, repo: str, revision: str) -> Reply:
    found, listed = request.commit(repo, revision), []
    known = request.repository(repo).commits
    while True:
        authors = [{"user": found.author}]
        date = found.date.isoformat().replace("+00:00", ".000Z")
        listed.append({"id": found.oid, "title": found.summary, "message": "", "authors": authors, "date": date})
        if found.parent not in known:
            return Reply(listed)
        found = known[found.parent]


@route("GET", "/api/models/{repo}/tree/{revision}")
@route("GET", "/api/datasets/{repo}/tree/{revision}")
def tree(request: Request, repo: str, revision: str) -> Reply:
    return Reply([file.entry(name) for name, file in request.commit(repo, revision).files.items()])


@route("POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(request: Request, repo: str, revision: str) -> Reply:
    files = request.commit(repo, revision).files
    return Reply([files[name].entry(name) for name in parse_qs(request.body.decode())["paths"] if name in files])


@route("GET", "/api/models/{repo}/tree/{revision}/{path}")
def folder(request: Request, repo: str, revision: str, path: str) -> Reply:
    """The direct entries of a folder."""
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
@route("GET", "/datasets/{repo}/resolve/{revision}/{path}")
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

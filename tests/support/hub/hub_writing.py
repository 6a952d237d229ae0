"""The write routes of the test Hub: repositories, large files, commits, pull requests, branches and tags."""

import base64
import hashlib
import json
import re
from http import HTTPStatus
from typing import Any

from hub_state import LFS_SUFFIXES, SIGNATURE, File, RefusedError, Reply, Repository, Request, route


@route("POST", "/api/repos/create")
def create(request: Request) -> Reply:
    if request.user is None:
        raise RefusedError(HTTPStatus.UNAUTHORIZED, error="Invalid username or password.")
    requested = request.json
    owner = requested["organization"] or request.user
    if owner != request.user:
        raise RefusedError(HTTPStatus.FORBIDDEN, error=f"You don't have the rights to create a model under {owner}")
    repo = f"{owner}/{requested['name']}"
    answer = {"url": f"{request.hub.url}/{repo}", "name": repo}
    if repo in request.hub.repositories:
        raise RefusedError(HTTPStatus.CONFLICT, error="You already created this model repo", **answer)
    request.hub.repositories[repo] = repository = Repository(private=requested.get("visibility") == "private")
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
    request.repository(repo, write="create_pr" not in request.query)
    there = request.commit(repo, revision).files
    modes = [
        {
            "oid": there[file["path"]].etag if file["path"] in there else None,
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
            "shouldIgnore": False,
        }
        for file in request.json["files"]
    ]
    return Reply({"files": modes})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(request: Request, repo: str) -> Reply:
    request.repository(repo)  # who may not write may still propose
    objects = []
    for requested in request.json["objects"]:
        upload = {"href": f"{request.hub.url}/lfs/{requested['oid']}?{SIGNATURE}"}
        verify = {"href": f"{request.hub.url}/lfs/{requested['oid']}/verify"}
        known = requested["oid"] in request.hub.blobs
        objects.append(requested if known else {**requested, "actions": {"upload": upload, "verify": verify}})
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
    if meanwhile := request.hub.before_commit:
        request.hub.before_commit = None
        meanwhile(request.hub)
    as_proposal = "create_pr" in request.query
    repository = request.repository(repo, write=not as_proposal)
    files = dict(request.commit(repo, revision).files)
    header: dict[str, Any] = {}
    for line in request.body.splitlines():
        match json.loads(line):
            case {"key": "header", "value": header}:
                parent = header.get("parentCommit", repository.branches[revision])
                if parent != repository.branches[revision] and not as_proposal:
                    raise RefusedError(HTTPStatus.PRECONDITION_FAILED, error="A commit has happened since. Please refresh.")
            case {"key": "file", "value": {"path": path, "content": content}}:
                files[path] = File(base64.b64decode(content), lfs=False)
            case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                if oid not in request.hub.blobs:
                    raise RefusedError(HTTPStatus.BAD_REQUEST, error=f"{path} was not uploaded")
                files[path] = File(request.hub.blobs[oid], lfs=True)
            case {"key": "deletedFile", "value": {"path": path}}:
                if path not in files:
                    raise RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound", error="A file with this name doesn't exist")
                del files[path]
    number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
    if as_proposal:
        repository.branches[f"refs/pr/{number}"] = repository.branches[revision]
        revision = f"refs/pr/{number}"
    made = repository.commit(revision, header["summary"], files, author=request.user or "")
    place = f"{request.hub.url}/{repo}"
    answer = {"commitOid": made.oid, "commitUrl": f"{place}/commit/{made.oid}", "success": True}
    return Reply(answer | ({"pullRequestUrl": f"{place}/discussions/{number}"} if as_proposal else {}))


@route("POST", "/api/models/{repo}/branch/{branch}")
def create_branch(request: Request, repo: str, branch: str) -> Reply:
    repository = request.repository(repo, write=True)
    if branch in repository.branches:
        raise RefusedError(HTTPStatus.CONFLICT, error="Reference already exists")
    repository.branches[branch] = request.commit(repo, request.json.get("startingPoint", "main")).oid
    return Reply({})


@route("POST", "/api/models/{repo}/tag/{revision}")
def create_tag(request: Request, repo: str, revision: str) -> Reply:
    repository, tag = request.repository(repo, write=True), request.json["tag"]
    if tag in repository.tags:
        raise RefusedError(HTTPStatus.CONFLICT, error="Tag reference exists already")
    repository.tags[tag] = request.commit(repo, revision).oid
    return Reply({})


@route("DELETE", "/api/models/{repo}/tag/{tag}")
def delete_tag(request: Request, repo: str, tag: str) -> Reply:
    if request.repository(repo, write=True).tags.pop(tag, None) is None:
        raise RefusedError(HTTPStatus.NOT_FOUND, "RevisionNotFound")
    return Reply({})

"""Downloads from the Hugging Face Hub: single files of a model at one commit, and files of a dataset.

An interrupted download of a model keeps its parts, and the next one resumes. `huggingface_hub` is imported only for a request.
"""

import glob
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llm.errors import InputError, Interrupted
from runner import credentials
from runner.artifacts import digest_file
from runner.files import write_whole
from runner.hub.files import HubFiles
from runner.hub.retries import DEFAULT_RETRIES, Retries, quiet_client, with_retries

TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class HubFile:
    """A file of a snapshot."""

    size: int
    sha256: str | None  # only of large files


@dataclass(frozen=True)
class Snapshot:
    """A commit of a model's repository."""

    repo: str  # "owner/name"
    commit: str
    files: Mapping[str, HubFile]  # by path in the repository

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:8]}"


def find_snapshot(repo: str, revision: str, *, kept: Path) -> Snapshot:
    """The commit of a branch, tag or commit id, from the file `kept` if it exists.

    InputError if the Hub has no such model or does not show it.
    """
    if kept.exists():
        known = json.loads(kept.read_text(encoding="utf-8"))
        return Snapshot(repo, known["commit"], {name: HubFile(**file) for name, file in known["files"].items()})
    from huggingface_hub import HfApi

    with as_input_error(repo, f"revision {revision!r}"):
        api = HfApi(endpoint=credentials.endpoint(), token=credentials.token() or False)
        info = api.model_info(repo, revision=revision, files_metadata=True)
    if info.sha is None:
        raise InputError(f"{repo}: the Hub returned no commit for revision {revision!r}")
    files: dict[str, HubFile] = {}
    for file in info.siblings or ():
        if file.size is None:
            raise InputError(f"{repo}@{info.sha[:8]}: the Hub returned no size for {file.rfilename}")
        files[file.rfilename] = HubFile(file.size, file.lfs.sha256 if file.lfs else None)
    write_whole(kept, json.dumps({"commit": info.sha, "files": {name: asdict(file) for name, file in files.items()}}))
    return Snapshot(repo, info.sha, files)


def download_file(
    snapshot: Snapshot,
    name: str,
    folder: Path,
    *,
    report: Callable[..., None] = lambda **values: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """The file `name` in `folder`, downloaded if it is missing; InputError if the Hub does not return it."""
    expected, path = snapshot.files[name], folder / name
    if path.exists():
        return path
    partial = path.with_name(path.name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    with as_input_error(snapshot.repo, name):
        while (size := partial.stat().st_size) < expected.size:
            try:
                for done in _stream(snapshot, name, partial):
                    report(done=done, total=expected.size, unit=f"bytes of {name}")
                    if should_stop():
                        raise Interrupted(f"stopped while downloading {name}; the downloaded part is kept")
            except (Interrupted, OSError):  # a refusal by the Hub is an OSError
                raise
            except Exception:  # the connection broke; the HTTP client may raise anything
                if partial.stat().st_size == size:  # no progress, so another request would fail too
                    raise
            else:
                break
    if partial.stat().st_size != expected.size or (expected.sha256 and digest_file(partial) != expected.sha256):
        partial.unlink()
        raise InputError(f"{snapshot}: {name} was damaged in transit; run again to download it")
    partial.replace(path)
    return path


def _stream(snapshot: Snapshot, name: str, partial: Path) -> Iterator[int]:
    """Appends the rest of a file to `partial`; yields its size as it grows."""
    from huggingface_hub import hf_hub_url, utils

    client: Any = utils  # its names exist at run time only
    done = partial.stat().st_size
    url = hf_hub_url(snapshot.repo, name, revision=snapshot.commit, endpoint=credentials.endpoint())
    # "identity", because a range of a compressed response counts compressed bytes.
    headers = client.build_hf_headers(token=credentials.token() or False) | {"Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    with client.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if response.is_error:
            response.read()  # the error message
        client.hf_raise_for_status(response)
        if response.status_code != 206:  # the whole file instead of the range
            done = 0
        with partial.open("r+b") as file:
            file.seek(done)
            file.truncate()
            for piece in response.iter_bytes():
                file.write(piece)
                file.flush()
                done += len(piece)
                yield done


@contextmanager
def as_input_error(repo: str, what: str, *, kind: Literal["model", "dataset"] = "model") -> Iterator[None]:
    """Turns the errors of the Hub's client into an InputError with a cure."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = repo if kind == "model" else f"datasets/{repo}"
    place = credentials.endpoint()
    access = "the token has no access" if credentials.token() else "it needs a token (HF_TOKEN, or `hf auth login`)"
    try:
        yield
    except (Interrupted, InputError):
        raise
    except GatedRepoError:
        raise InputError(
            f"{repo}: is gated, and {access}; accept its terms at {place}/{page}, and run with that account's token"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{repo}: {place} has no {what} of this {kind}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"{repo}: {place} has no such {kind}, or {access}") from None
    except RemoteEntryNotFoundError:
        raise InputError(f"{repo}: {place} has no file {what} in this {kind} at that commit") from None
    except OfflineModeIsEnabled:
        raise InputError(
            f"{repo}: {what} is not in the cache of the Hub's client, and HF_HUB_OFFLINE is set; run once without it"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk error
        reason = credentials.redact(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise InputError(
            f"{repo}: {what} cannot be downloaded from {place} ({reason}); run again to continue, the downloaded part is kept"
        ) from None


def download_dataset_files(files: HubFiles, *, retries: Retries = DEFAULT_RETRIES) -> list[Path]:
    """The local paths of the dataset files that `files` matches, sorted by their path in the dataset.

    Temporary failures are retried. InputError if there are none, or the Hub does not return them.
    """
    with as_input_error(files.repo, files.path, kind="dataset"), quiet_client():
        return with_retries(lambda: _download_dataset_files(files), retries)


def _download_dataset_files(files: HubFiles) -> list[Path]:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    place: dict[str, Any] = {"repo_type": "dataset", "revision": files.commit}
    source: dict[str, Any] = {"endpoint": credentials.endpoint(), "token": credentials.token() or False}
    try:
        if not files.is_pattern:
            return [Path(hf_hub_download(files.repo, files.path, **place, **source))]
        names = files.matching(_names(files))
        if not names:
            raise InputError(f"{files.repo}@{files.commit[:8]}: expected files like {files.path!r}, but the dataset has none")
        # The client also caches the list of all files, so that a pattern works offline later.
        folder = snapshot_download(files.repo, allow_patterns=[glob.escape(name) for name in names], **place, **source)
        return [Path(folder, name) for name in names]
    except LocalEntryNotFoundError as error:  # says only that there is no local copy; its cause is why the download failed
        raise error.__cause__ or error from None


def _names(files: HubFiles) -> list[str]:
    """All files of the dataset at the commit, from the client's cache or the Hub."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(files.repo, repo_type="dataset", revision=files.commit)]
    except CachedRepoTreeNotFoundError:
        api = HfApi(endpoint=credentials.endpoint(), token=credentials.token() or False)
        return api.list_repo_files(files.repo, repo_type="dataset", revision=files.commit)

"""A model's files from the Hugging Face Hub, at one commit. Which files, and what they are good for, is the caller's business.

What was downloaded stays when a download ends early, parts of a file too, and the next one goes on from there.
`huggingface_hub` is imported only to ask the Hub. A token is read, sent, and never written anywhere, messages included.
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
from runner.hub.retries import PATIENT, Retries, attempted, quiet

TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class File:
    """What the Hub says of a file."""

    size: int
    sha256: str | None  # of large files


@dataclass(frozen=True)
class Snapshot:
    """A commit of a model's repository."""

    repo: str  # "owner/name"
    commit: str
    files: Mapping[str, File]  # by path in the repository

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:8]}"


def find(repo: str, revision: str, *, kept: Path) -> Snapshot:
    """The commit that a branch, tag or commit stands for; what `kept` remembers if that was asked before.

    InputError if the Hub has no such model or does not show it.
    """
    if kept.exists():
        known = json.loads(kept.read_text(encoding="utf-8"))
        return Snapshot(repo, known["commit"], {name: File(**file) for name, file in known["files"].items()})
    from huggingface_hub import HfApi

    with explained(repo, f"revision {revision!r}"):
        api = HfApi(endpoint=credentials.endpoint(), token=credentials.token() or False)
        info = api.model_info(repo, revision=revision, files_metadata=True)
    if info.sha is None:
        raise InputError(f"{repo}: the Hub tells no commit for revision {revision!r}")
    files: dict[str, File] = {}
    for file in info.siblings or ():
        if file.size is None:
            raise InputError(f"{repo}@{info.sha[:8]}: the Hub tells no size of {file.rfilename}")
        files[file.rfilename] = File(file.size, file.lfs.sha256 if file.lfs else None)
    write_whole(kept, json.dumps({"commit": info.sha, "files": {name: asdict(file) for name, file in files.items()}}))
    return Snapshot(repo, info.sha, files)


def fetch(
    snapshot: Snapshot,
    name: str,
    folder: Path,
    *,
    report: Callable[..., None] = lambda **values: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """The file `name` under `folder`, downloaded unless it is there whole; InputError if the Hub does not give it."""
    wanted, path = snapshot.files[name], folder / name
    if path.exists():
        return path
    partial = path.with_name(path.name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    with explained(snapshot.repo, name):
        while (size := partial.stat().st_size) < wanted.size:
            try:
                for done in _stream(snapshot, name, partial):
                    report(done=done, total=wanted.size, unit=f"bytes of {name}")
                    if should_stop():
                        raise Interrupted(f"stopped while {name} was downloaded; what is there is kept")
            except (Interrupted, OSError):  # whatever the Hub refuses is an OSError
                raise
            except Exception:  # the connection broke, in whatever words of the HTTP client
                if partial.stat().st_size == size:  # and brought nothing: it will not get better by asking at once
                    raise
            else:
                break
    if partial.stat().st_size != wanted.size or (wanted.sha256 and digest_file(partial) != wanted.sha256):
        partial.unlink()
        raise InputError(f"{snapshot}: {name} was damaged on the way; run again to download it anew")
    partial.replace(path)
    return path


def _stream(snapshot: Snapshot, name: str, partial: Path) -> Iterator[int]:
    """Append to `partial` what is missing of a file; yields its size as it grows."""
    from huggingface_hub import hf_hub_url, utils

    client: Any = utils  # its names are there at run time only
    done = partial.stat().st_size
    url = hf_hub_url(snapshot.repo, name, revision=snapshot.commit, endpoint=credentials.endpoint())
    # "identity", because a range of a compressed file would be one of its compressed bytes.
    headers = client.build_hf_headers(token=credentials.token() or False) | {"Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    with client.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if response.is_error:
            response.read()  # what the Hub says about it
        client.hf_raise_for_status(response)
        if response.status_code != 206:  # the whole file, whatever was asked
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
def explained(repo: str, what: str, *, kind: Literal["model", "dataset"] = "model") -> Iterator[None]:
    """Turns what the Hub's client raises into an InputError of one paragraph."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = repo if kind == "model" else f"datasets/{repo}"
    place, who = (
        credentials.endpoint(),
        "the token" if credentials.token() else "anybody without a token (HF_TOKEN, or `hf auth login`)",
    )
    try:
        yield
    except (Interrupted, InputError):
        raise
    except GatedRepoError:
        raise InputError(
            f"{repo}: is gated and not shown to {who}; accept its terms at {place}/{page}, and run with that account's token"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{repo}: {place} has no {what} of this {kind}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"{repo}: {place} has no such {kind}, or does not show it to {who}") from None
    except RemoteEntryNotFoundError:
        raise InputError(f"{repo}: {place} has no file {what} in this {kind} at that commit") from None
    except OfflineModeIsEnabled:
        raise InputError(
            f"{repo}: {what} is not in the cache of the Hub's client, and HF_HUB_OFFLINE forbids to fetch it; run once without"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a fault of the disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if secret := credentials.token():
            reason = reason.replace(secret, "***")
        raise InputError(
            f"{repo}: {what} cannot be downloaded from {place} ({reason}); run again to go on, what is there is kept"
        ) from None


def fetch_rows(wanted: HubFiles, *, retries: Retries = PATIENT) -> list[Path]:
    """The files that `wanted` means, sorted by their path in the dataset.

    What may pass is tried again. InputError where there are none, or the Hub does not give them.
    """
    with explained(wanted.repo, wanted.path, kind="dataset"), quiet():
        return attempted(lambda: _fetch_rows(wanted), retries)


def _fetch_rows(wanted: HubFiles) -> list[Path]:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    place: dict[str, Any] = {"repo_type": "dataset", "revision": wanted.commit}
    source: dict[str, Any] = {"endpoint": credentials.endpoint(), "token": credentials.token() or False}
    try:
        if not wanted.is_pattern:
            return [Path(hf_hub_download(wanted.repo, wanted.path, **place, **source))]
        names = wanted.matching(_names(wanted))
        if not names:
            raise InputError(f"{wanted.repo}@{wanted.commit[:8]}: expected files like {wanted.path!r}; the dataset has none")
        # Its list of all files is kept by the client too, which is what makes a pattern known without network later.
        folder = snapshot_download(wanted.repo, allow_patterns=[glob.escape(name) for name in names], **place, **source)
        return [Path(folder, name) for name in names]
    except LocalEntryNotFoundError as error:  # says that nothing is here; its cause is why nothing came
        raise error.__cause__ or error from None


def _names(wanted: HubFiles) -> list[str]:
    """All files of the dataset at the commit, as the client remembers them, else as the Hub tells."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(wanted.repo, repo_type="dataset", revision=wanted.commit)]
    except CachedRepoTreeNotFoundError:
        api = HfApi(endpoint=credentials.endpoint(), token=credentials.token() or False)
        return api.list_repo_files(wanted.repo, repo_type="dataset", revision=wanted.commit)

"""Files of a dataset on the Hugging Face Hub, fetched by its own client into its own cache.

What is in that cache is not asked for again, so a stage runs without network once its files were fetched. `huggingface_hub` is
imported only here, when a stage reads them. A token is read, sent, and never written anywhere, messages included.
"""

import glob
from pathlib import Path
from typing import Any

from llm.errors import InputError
from runner import hub
from runner.hub.download import explained
from runner.reading.hub_files import HubFiles
from runner.retries import PATIENT, Retries, attempted, quiet


def fetch(wanted: HubFiles, *, retries: Retries = PATIENT) -> list[Path]:
    """The files that `wanted` means, sorted by their path in the dataset.

    What may pass is tried again. InputError where there are none, or the Hub does not give them.
    """
    with explained(wanted.repo, wanted.path, kind="dataset"), quiet():
        return attempted(lambda: _fetch(wanted), retries)


def _fetch(wanted: HubFiles) -> list[Path]:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    place: dict[str, Any] = {"repo_type": "dataset", "revision": wanted.commit}
    source = {"endpoint": hub.endpoint(), "token": hub.token() or False}
    try:
        if not wanted.is_pattern:
            return [Path(hf_hub_download(wanted.repo, wanted.path, **place, **source))]
        names = wanted.among(_names(wanted))
        if not names:
            raise InputError(f"{wanted.repo}@{wanted.commit[:8]}: wants files like {wanted.path!r}; the dataset has none")
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
        api = HfApi(endpoint=hub.endpoint(), token=hub.token() or False)
        return api.list_repo_files(wanted.repo, repo_type="dataset", revision=wanted.commit)

"""A published model as a recipe to run: `run hf://owner/name`.

    published/<owner>--<name>-<commit>/    in the cache
      published/    recipe.toml and recipe.lock.json as they were published
      data/         its input files, where they were found
      recipe.toml   the recipe that is run

Both files are untrusted. The recipe runs in its own folder, which bounds what it may read; its input files are placed there,
and found by digest alone. The push target, cache, trackers and notices of its author are removed: the user decides on those.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import tomli
import tomli_w

from llm.errors import InputError
from runner.artifacts import Release, digest_file
from runner.cache.digests import DigestMemo, FileContent
from runner.cache.store import Store
from runner.errors import RecipeError, RemoteError
from runner.files import link_or_copy, write_whole
from runner.hub import download
from runner.hub.files import COMMIT, SCHEME
from runner.published.lockfile import Lock, read_lock
from runner.recipe.toml import DEPTH, is_too_deep
from runner.stages.publish import Publish

ADDRESS = re.compile(r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*?)(@(?P<revision>\w[\w-]*([./]\w[\w-]*)*))?/?")
MAX_BYTES = 16 * 2**20  # of a recipe or a lock file
PLAIN_NAME = re.compile(r"\w[\w.-]*")
STEP = re.compile(r"(\w+)|\[(\d{1,6})\]")


@dataclass(frozen=True)
class Address:
    """The address of a published model."""

    repo: str  # "owner/name"
    revision: str = "main"  # branch, tag or commit

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address hf://owner/name[@revision]; RecipeError for any other form."""
        match = ADDRESS.fullmatch(text)
        if match is None:
            raise RecipeError(f"RECIPE: expected hf://OWNER/NAME[@REVISION], got {text!r}")
        return cls(match["repo"], match["revision"] or "main")

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + ("" if self.revision == "main" else f"@{self.revision}")


@dataclass(frozen=True)
class Published:
    """A downloaded published recipe."""

    name: str  # "owner/name@commit"
    recipe: Path  # the recipe that is run
    lock: Lock
    absent: Mapping[str, Sequence[FileContent]] = field(default_factory=dict)  # path -> the contents it should have


def download_recipe(address: Address, store: Store, *, data: Sequence[Path]) -> Published:
    """Downloads recipe and lock file, and places the input files that are found by their digests: among files read before, in
    the folders `data`, and in the repository itself.

    The digest memo of `store` promises the contents of missing files, so that results made from them can be reused.
    RemoteError if the Hub does not return the files, RecipeError if they are not those of a release.
    """
    for folder in data:
        if not folder.is_dir():
            raise RecipeError(f"--data {folder}: expected a folder, got {'a file' if folder.exists() else 'none'}")
    try:
        snapshot = _snapshot(address, store.root / "published")
        place = store.root / "published" / f"{address.repo.replace('/', '--')}-{snapshot.commit[:12]}"
        release = Release(place / "published")
        recipe_text, lock_text = (_text(snapshot, path) for path in (release.recipe, release.lock))
        lock = read_lock(lock_text, f"{snapshot}: recipe.lock.json")
        finder = _Finder(store.digests, data, snapshot, place / "downloads")
        table = _without_user_fields(recipe_text, f"{snapshot}: recipe.toml")
        absent = dict(_place_inputs(table, lock, place.resolve(), finder))
    except InputError as error:
        raise RemoteError(str(error)) from error
    write_whole(place / "recipe.toml", tomli_w.dumps(table))
    store.digests.promised = absent
    return Published(str(snapshot), place / "recipe.toml", lock, absent)


def _snapshot(address: Address, root: Path) -> download.Snapshot:
    """The commit of the address; requested each time unless the address names one."""
    kept = root / "snapshots" / f"{address.repo.replace('/', '--')}-{address.revision.replace('/', '--')}.json"
    if not COMMIT.fullmatch(address.revision):
        kept.unlink(missing_ok=True)
    return download.find_snapshot(address.repo, address.revision, kept=kept)


def _text(snapshot: download.Snapshot, path: Path) -> str:
    """The text of a file of the snapshot, downloaded to `path`."""
    name = path.name
    if name not in snapshot.files:
        raise RecipeError(f"{snapshot}: expected a model that was published by this program, got one without {name}")
    if snapshot.files[name].size > MAX_BYTES:
        raise RecipeError(f"{snapshot}: {name}: expected at most {MAX_BYTES:,} bytes, got {snapshot.files[name].size:,}")
    try:
        return download.download_file(snapshot, name, path.parent).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{snapshot}: {name}: expected UTF-8 text, got other bytes ({error.reason})") from None


def _without_user_fields(text: str, place: str) -> dict[str, Any]:
    """The table of a recipe without its author's cache, trackers, notices and push target."""
    try:
        table = tomli.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{place}: is not TOML: {error}") from error
    if is_too_deep(table):
        raise RecipeError(f"{place}: expected tables and lists at most {DEPTH} deep, got deeper ones")
    stages = table.get("stage")
    if "extends" in table or not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise RecipeError(f"{place}: expected a resolved recipe, as `run show` prints it, got something else")
    for name in ("cache", "tracking"):
        table.pop(name, None)
    for alerts in (table.get("alerts"), *(stage.get("alerts") for stage in stages.values())):
        if isinstance(alerts, dict):
            alerts.pop("notify", None)
    for stage in stages.values():
        if stage.get("kind") == "publish":
            for name in Publish.user_fields:
                stage.pop(name, None)
    return table


# Input files


def _place_inputs(
    table: dict[str, Any], lock: Lock, folder: Path, finder: "_Finder"
) -> Iterator[tuple[str, Sequence[FileContent]]]:
    """Points every field with input files to a place in `folder`, and puts the files that are found there.

    Yields the places with missing files and the contents they should have; those places stay empty.
    """
    places: dict[tuple[LockedFiles, bool], str] = {}
    for stage, locked in lock.stages.items():
        for dotted, files in locked.data.items():
            fields = table["stage"].get(stage, {})
            written = _get(fields, dotted)
            if not isinstance(written, str) or not files:
                raise RecipeError(
                    f"recipe.lock.json: expected stage.{stage}.{dotted} to name input files in the recipe, got {written!r}"
                )
            contents = tuple(files)
            is_folder = all(str(PurePosixPath(content.file).parent) == str(PurePosixPath(written)) for content in contents)
            place = places.setdefault((contents, is_folder), f"data/{len(places)}")
            names = _names_of(contents, is_folder)
            value = place if is_folder else f"{place}/{names[0] if len(names) == 1 else '*'}"
            _set(fields, dotted, value)
            if not _filled(folder / place, dict(zip(names, contents, strict=True)), finder):
                yield str(folder / value), contents


LockedFiles = tuple[FileContent, ...]


def _names_of(contents: Sequence[FileContent], is_folder: bool) -> list[str]:
    """The local names of the files: their own in a folder that is read by name, else numbers in their order."""
    if not is_folder:
        return [f"{number:05d}{content.format}" for number, content in enumerate(contents)]
    names = [PurePosixPath(content.file).name for content in contents]
    if invalid := [name for name in names if not PLAIN_NAME.fullmatch(name)]:
        raise RecipeError(f"recipe.lock.json: expected plain file names, got {invalid[0]!r}")
    return names


def _filled(folder: Path, contents: Mapping[str, FileContent], finder: "_Finder") -> bool:
    """Places the files in the folder and removes all others; false, with an empty folder, if one is not found."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in contents or digest_file(path) != contents[path.name].sha256:
            path.unlink()
    found = {name: folder / name if (folder / name).exists() else finder.find(content) for name, content in contents.items()}
    if not all(found.values()):
        for path in folder.iterdir():
            path.unlink()
        return False
    for name, source in found.items():
        if source is not None and source != folder / name:
            link_or_copy(source, folder / name)
    return True


class _Finder:
    """Finds files by their content."""

    def __init__(self, memo: DigestMemo, folders: Sequence[Path], snapshot: download.Snapshot, downloads: Path) -> None:
        self._memo, self._snapshot, self._downloads = memo, snapshot, downloads
        self._by_size: dict[int, list[Path]] = {}
        for folder in folders:
            for place, _, files in os.walk(folder):
                for name in files:
                    path = Path(place, name)
                    if path.is_file():
                        self._by_size.setdefault(path.stat().st_size, []).append(path)

    def find(self, content: FileContent) -> Path | None:
        """A file with this content, else None."""
        if known := self._memo.paths_of(content.sha256):
            return known[0].resolve()
        for path in self._by_size.get(content.bytes, ()):
            if self._memo.of(path) == content.sha256:
                return path.resolve()
        for name, file in self._snapshot.files.items():
            may_match = file.sha256 == content.sha256 or (name == content.file and file.size == content.bytes)
            if may_match and all(map(PLAIN_NAME.fullmatch, name.split("/"))):
                fetched = download.download_file(self._snapshot, name, self._downloads)
                if digest_file(fetched) == content.sha256:
                    return fetched
        return None


def _get(value: Any, dotted: str) -> Any:
    """The value of a dotted field such as `sources[0].files`, else None."""
    for name, index in STEP.findall(dotted):
        if name:
            value = value.get(name) if isinstance(value, dict) else None
        else:
            value = value[int(index)] if isinstance(value, list) and int(index) < len(value) else None
    return value


def _set(value: Any, dotted: str, new: str) -> None:
    """Sets a dotted field that exists."""
    *above, (name, index) = STEP.findall(dotted)
    for step, number in above:
        value = value[step] if step else value[int(number)]
    value[name or int(index)] = new

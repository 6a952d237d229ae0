"""The folder of compiled code: kernels, and what torch.compile keeps, some of it pickled.

To open it is to run it. So it is the user's own folder, never part of a cache, which may come with a recipe, in an archive or
from a remote.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from llm.files import private_folder
from runner.errors import StageError

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # of torch; a user who sets it has chosen the folder
DAYS = 30.0  # for which code is kept that nothing opens
MOST_BYTES = 10 * 10**9


def compiled_folder() -> Path:
    """The folder, which only its owner can enter; StageError if somebody else may have written to it."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).absolute()
    import platformdirs

    try:
        return private_folder(platformdirs.user_cache_path("stockpot") / "compiled")
    except OSError as error:
        raise StageError(
            f"{error.filename}: expected a folder for compiled code that nobody else can write to, got: {error.strerror}; "
            f"remove it, or set {VARIABLE} to another folder"
        ) from error


def collect(*, dry_run: bool) -> tuple[int, int]:
    """Removes what nothing opened for DAYS, then the oldest until MOST_BYTES are left. Returns bytes removed and left.

    Whoever needs it compiles it again. A folder that the user has chosen is left alone, since other programs may use it.
    """
    if os.environ.get(VARIABLE):
        return 0, 0
    folder = compiled_folder()
    files = sorted((max(status.st_atime, status.st_mtime), status.st_size, path) for path, status in _files(folder))
    left, removed, oldest = sum(size for _, size, _ in files), 0, time.time() - DAYS * 86400
    for used, size, path in files:
        if used >= oldest and left <= MOST_BYTES:
            break
        left, removed = left - size, removed + size
        if not dry_run:
            path.unlink(missing_ok=True)
    for place, _, _ in [] if dry_run else sorted(os.walk(folder), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            Path(place).rmdir()
    return removed, left


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield Path(place, name), Path(place, name).lstat()

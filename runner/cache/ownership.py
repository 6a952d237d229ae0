"""Which cache a recipe uses, and whose it is: one beside the recipe may have come with it, and its records then prove nothing.

    CACHE/id                                 a random number, made with the first file of a cache
    STATE/stockpot/caches/<hash of path>     the number of the cache at that path; STATE is the user's own folder

A cache is the user's if both agree: it was made here by this user's command, or the user has named it once.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from runner.errors import RecipeError
from runner.files import read_bounded, write_whole

ID = "id"
ID_LENGTH = 32  # characters


def cache_of(recipe: Path, option: Path | None) -> Path:
    """The cache that `--cache` or STOCKPOT_CACHE names, else the one beside the recipe, which becomes the user's where it
    holds nothing yet; RecipeError where it holds something and is not the user's.
    """
    place = cache_beside(recipe)
    beside = place.resolve()
    named = option or os.environ.get("STOCKPOT_CACHE")
    root = Path(named).resolve() if named else beside
    if root == beside and not _is_claimed(root):
        came = place.is_symlink()  # to a folder that whoever made the link chose
        if (not (empty := _is_empty(root)) or came) and not named:
            raise RecipeError(
                f"{root}: expected a cache that your runs made, got one that came with its folder, from another machine or "
                f"from another user: its results may be forged; to use them, pass --cache {root} once; else remove it"
            )
        _claim(root, anew=empty)
    return root


def cache_beside(recipe: Path) -> Path:
    """cache/ beside the nearest pyproject.toml above the recipe, else in the current folder."""
    for folder in recipe.resolve().parents:
        if (folder / "pyproject.toml").exists():
            return folder / "cache"
    return Path("cache")


def _is_claimed(root: Path) -> bool:
    found = _read(root / ID)
    return found is not None and found == _read(_claim_of(root))


def _claim(root: Path, *, anew: bool) -> None:
    """Makes the cache the user's, with a number that nobody else knows if `anew`; nothing happens where the user's folder or
    the cache cannot be written.
    """
    with contextlib.suppress(OSError):
        found = None if anew else _read(root / ID)
        if found is None:
            found = os.urandom(ID_LENGTH // 2).hex()
            write_whole(root / ID, found, durable=False)
        write_whole(_claim_of(root), found, durable=False)


def _is_empty(root: Path) -> bool:
    """Whether nothing but a number and hidden files lies there."""
    try:
        return all(path.name == ID or path.name.startswith(".") for path in root.iterdir())
    except FileNotFoundError:
        return True


def _claim_of(root: Path) -> Path:
    from platformdirs import user_state_path

    return user_state_path("stockpot") / "caches" / hashlib.sha256(os.fsencode(root)).hexdigest()


def _read(path: Path) -> str | None:
    try:
        found = read_bounded(path, ID_LENGTH).decode()
    except (OSError, ValueError):
        return None
    return found if len(found) == ID_LENGTH else None

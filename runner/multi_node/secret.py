"""The secret that the machines of a run share: from the environment, else from a file of the user."""

import os
import secrets
import stat
from pathlib import Path

from runner.errors import RecipeError

VARIABLE = "STOCKPOT_MACHINES_SECRET"
SHORTEST = 32  # characters


def shared_secret() -> bytes:
    """The secret; a file for it is made on first use, so machines that share a home folder need nothing else.

    RecipeError if it is too short, or if others can read the file.
    """
    if text := os.environ.get(VARIABLE, "").strip():
        return _checked(text, VARIABLE)
    import platformdirs

    path = platformdirs.user_config_path("stockpot") / "machines.secret"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except FileExistsError:
        pass
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be written ({error.strerror}); set {VARIABLE} to a secret on every machine"
        ) from error
    return _checked(_private_text(path), str(path))


def _private_text(path: Path) -> str:
    """The text of a file of this user that nobody else can read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise RecipeError(f"{path}: expected a file of yours, got: {error.strerror}; remove it") from error
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise RecipeError(f"{path}: expected a file of yours that nobody else can read; chmod 600 {path}, or remove it")
        return file.read(4096).strip()


def _checked(text: str, place: str) -> bytes:
    if len(text) < SHORTEST:
        raise RecipeError(
            f"{place}: expected a secret of at least {SHORTEST} characters, got {len(text)}; `openssl rand -hex 32`"
        )
    return text.encode()

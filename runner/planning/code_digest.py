"""The digest of the code that makes a kind of artifact. It is kept in records and is no part of a key: a kind raises its
`version` when the same fields give another result.
"""

import hashlib
import sys
from functools import cache
from pathlib import Path

import llm
from runner.stage import Stage


def code_digest(stage: type[Stage]) -> str:
    """sha256 of the modules of the stage and its base classes, and of everything in `llm`."""
    modules = sorted({parent.__module__ for parent in stage.__mro__ if issubclass(parent, Stage)})
    own = [_bytes_digest(Path(sys.modules[module].__file__ or "")) for module in modules]
    return hashlib.sha256("".join([*own, _llm_digest()]).encode()).hexdigest()


@cache
def _llm_digest() -> str:
    modules = sorted(Path(llm.__path__[0]).rglob("*.py")) + sorted(Path(llm.__path__[0]).rglob("*.cpp"))
    return "".join(_bytes_digest(path) for path in modules)


@cache
def _bytes_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

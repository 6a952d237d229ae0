"""Kernels in C++ of our own, built by the machine's own compiler when they are first needed.

They are kept beside the output of torch.compile, in a folder that only its owner can enter; without such a folder they are
built for one process.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llm.device import find_compiler
from llm.files import private_folder

STANDARD = ["-std=c++17", "-O3"]
OPENMP = "-fopenmp"


class UnavailableError(Exception):
    """The kernel cannot be built or run here; the message says why."""


def load(source: Path, flags: Sequence[str], *, folder: str) -> ctypes.CDLL:
    """The library made of `source`, in the folder of that name; UnavailableError where it cannot be built."""
    program = find_compiler()
    if program is None:
        raise UnavailableError("expected g++ or clang++ to build it, got no C++ compiler")
    if OPENMP in flags and "clang" in Path(program).name:
        raise UnavailableError(f"expected g++ to build it, got {program}, whose OpenMP has threads beside those of torch")
    command = [program, *STANDARD, *flags, "-shared", "-fPIC"]
    try:
        name = hashlib.sha256(" ".join(command).encode() + source.read_bytes()).hexdigest()[:32]
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        if kept is not None:
            return _load([*command, str(source)], Path(kept) / folder / f"{name}.so")
        with tempfile.TemporaryDirectory() as scratch:
            return _load([*command, str(source)], Path(scratch) / f"{name}.so")
    except OSError as error:
        raise UnavailableError(str(error)) from error


def _load(command: list[str], place: Path) -> ctypes.CDLL:
    private_folder(place.parent)  # what lies there is run
    if not place.exists():
        _build(command, place)
    try:
        return ctypes.CDLL(str(place))
    except OSError:  # built on another system, say
        _build(command, place)
        return ctypes.CDLL(str(place))


def _build(command: list[str], place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:  # other processes may build it at the same time
        partial = Path(scratch) / place.name
        built = subprocess.run(
            [*command, "-o", str(partial)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if built.returncode != 0:
            lines = built.stderr.splitlines() or ["it failed"]
            raise UnavailableError(f"{command[0]}: {next((line for line in lines if ': error: ' in line), lines[0])}")
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # loading a file torn by a power cut would crash the process
        partial.replace(place)

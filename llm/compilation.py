"""When torch.compile is worth its time, and whether it can work here at all. What is compiled is the architecture's business.

Compiled code is kept in TORCHINDUCTOR_CACHE_DIR, which a run sets to a folder of its cache, so a second training of the same
shape starts almost at once. A note of each shape lies beside it: how long compiling will take is known before it is tried.
"""

import hashlib
import os
import shutil
from importlib import util
from pathlib import Path
from typing import Literal

import torch

NOTES = "trained"  # in the cache folder: one empty file per shape of training that was compiled
# Measured on 2 cores, 2.5M to 29M parameters: layers compile in 21 to 24 s where the cache is empty, in 5 s from it; steps
# then take 5 to 10% less time, most where products are small. A GPU compiles longer and is faster, so it wants more work
# before it pays.
COLD_SECONDS = {"cpu": 20.0, "cuda": 45.0}
WARM_SECONDS = {"cpu": 5.0, "cuda": 10.0}
SAVED = {"cpu": 0.08, "cuda": 0.15}  # share of a training's time
SPEED = {"cpu": 2e11, "cuda": 1e14}  # floating-point operations per second, roughly: of a small model, where it is a question


def resolve_compile(wanted: bool | Literal["auto"], *, device: str, flops: float, shape: str) -> bool:
    """Whether to compile a training of `flops` operations; `shape` is a text that names all that compiling depends on."""
    if wanted != "auto":
        return wanted
    if device not in SPEED or not has_compiler(device):
        return False
    path = note_of(shape)
    cost = WARM_SECONDS if path is not None and path.exists() else COLD_SECONDS
    return flops / SPEED[device] * SAVED[device] > cost[device]


def has_compiler(device: str) -> bool:
    """Whether this machine has what torch.compile needs: a C++ compiler for a CPU, Triton for a GPU."""
    return util.find_spec("triton") is not None if device == "cuda" else compiler() is not None


def compiler() -> str | None:
    """The C++ compiler of this machine: CXX, else g++ or clang++; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


def note_of(shape: str) -> Path | None:
    """The file that says that a training of this shape has been compiled here; None where no folder is kept for that."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        return None
    return Path(folder) / NOTES / hashlib.sha256(f"{torch.__version__} {shape}".encode()).hexdigest()


def note(shape: str) -> None:
    """Write it."""
    if path := note_of(shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

"""The speed of the fastest matrix product here: training shows what share of the hardware it uses by comparing with it.

The best that was ever measured is kept beside compiled code, in TORCHINDUCTOR_CACHE_DIR, which a run sets to a folder of the
user: a training that is too short to measure it shows its share all the same.
"""

import hashlib
import json
import math
import os
import platform
from pathlib import Path

import torch

from llm.device import Precision, is_out_of_memory, seconds_per_call
from llm.files import write_json

KEPT = "peaks"  # in the cache folder: a file per hardware and precision
SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # sizes of products; a training measures the first
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of measuring: five products of 1024 x 1024 on a CPU, or of 4096 x 4096 on a GPU. Measured 0.11 s on 2 cores in bf16 at
# 900 GFLOP/s and 0.15 s in fp32 at 230; beside other work up to 0.3 s.
SECONDS = 0.3
ROUNDS, ROUND_SECONDS = 3, 0.02
MOST_SHARE = 0.01  # of the time left of a training that measuring may take

Shape = tuple[int, int, int]  # rows, inner size, columns: (rows, inner) @ (inner, columns)


class Product:
    """One matrix product as a linear layer computes it, x @ weight.T, over and over."""

    def __init__(self, shape: Shape, precision: str, *, device: torch.device) -> None:
        rows, inner, columns = shape
        dtype = DTYPES[precision]
        self._x = torch.randn(rows, inner, device=device).to(dtype)
        self._weight = torch.randn(columns, inner, device=device).to(dtype)
        self._out = torch.empty(rows, columns, dtype=dtype, device=device)
        self.flops = 2.0 * rows * inner * columns

    def __call__(self) -> None:
        """Compute it once."""
        torch.mm(self._x, self._weight.t(), out=self._out)


def peak_flops(precision: Precision, *, device: torch.device, threads: int, seconds_left: float) -> float | None:
    """Floating-point operations per second of one process.

    None where nothing was measured before, and measuring would take more than MOST_SHARE of `seconds_left`.
    """
    path = _path(precision, device=device, threads=threads)
    known = float(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.exists() else None
    if seconds_left * MOST_SHARE < SECONDS or device.type not in SQUARES:
        return known
    try:
        best = max(_measured(precision, device=device), known or 0.0)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return known  # the training needs all of it
    if path is not None and best != known:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, best)
    return best


def _measured(precision: Precision, *, device: torch.device) -> float:
    """By the fastest of a few rounds: other work on the machine only makes them slower."""
    size = SQUARES.get(device.type, SQUARES["cpu"])[0]
    product = Product((size, size, size), precision, device=device)
    product()
    calls = max(1, math.ceil(ROUND_SECONDS / seconds_per_call(product, device=device)))
    return product.flops / min(seconds_per_call(product, device=device, calls=calls) for _ in range(ROUNDS))


def _path(precision: Precision, *, device: torch.device, threads: int) -> Path | None:
    """The file that keeps the best of this hardware; None without a folder for it."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.node()} {threads} threads"
    facts = f"{torch.__version__} {precision} {device.type} {name}"
    return Path(folder) / KEPT / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"

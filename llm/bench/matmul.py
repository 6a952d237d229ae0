"""The peak of matrix products: the speed of the fastest among square products and those of the model.

Shares of the peak are shares of what was measured here, not of what a data sheet promises.
"""

from typing import Any

import torch
from torch import nn

from llm.bench.timing import interleaved
from llm.training.mfu import DTYPES, SQUARES, Product, Shape
from llm.training.micro_batch import MOST


def shapes(model: nn.Module, *, tokens: int, device: torch.device) -> list[Shape]:
    """Square products, and those of the model's linear layers on `tokens` positions, at most those of a micro-batch."""
    tokens = min(tokens, MOST[device.type])
    found: list[Shape] = [(size, size, size) for size in SQUARES[device.type]]
    found += [(tokens, module.in_features, module.out_features) for module in model.modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(found))


def measure_matmul(candidates: list[Shape], *, seconds: float, device: torch.device) -> dict[str, Any]:
    """For each precision: `gflops` and `shape` of the fastest product, and `shapes` with all of them."""
    products = {(name, shape): Product(shape, name, device=device) for name in DTYPES for shape in candidates}
    timings = interleaved(products, seconds=seconds / len(products), device=device)
    result: dict[str, Any] = {}
    for name in DTYPES:
        speeds = {shape: products[name, shape].flops / timings[name, shape].median / 1e9 for shape in candidates}
        best = max(speeds, key=lambda shape: speeds[shape])
        result[name] = {
            "gflops": speeds[best],
            "shape": list(best),
            "shapes": {shown(shape): speed for shape, speed in speeds.items()},
        }
    return result


def shown(shape: Shape) -> str:
    """A shape as text."""
    rows, inner, columns = shape
    return f"{rows}x{inner} @ {inner}x{columns}"

"""How much memory this process has used at most."""

import resource
import sys

import torch


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator on "cuda", else of the process since it started."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

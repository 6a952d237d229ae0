"""How many rows a micro-batch that is "auto" has, before memory is asked. No torch: planning reckons with it, too.

More rows take more memory for activations and stop paying where the fixed costs of a pass are small beside its products. These
are the time of its operations besides products, about that of 2.5e9 floating-point operations, and the passes over weights:
reading those that do not learn, and adding up the gradients of those that do.
"""

import math

# Positions of a micro-batch, at most. On a CPU, activations of more than this do not fit in the cache; a GPU is busy with this
# many.
MOST = {"cpu": 4096, "cuda": 65536}
# On a CPU, where passes over weights take about 1/40 of the time: with 8 rows of 512 SmolLM2-135M learns no faster than with
# 4, its adapter no faster than with 2.
LEAST_FULL, LEAST_ADAPTER = 2048, 1024
ENOUGH = 5e11  # floating-point operations of a pass


def auto_rows(context: int, *, flops_per_token: float, adapter: bool, device: str = "cpu") -> int:
    """Rows of `context` positions, a power of two; `adapter`: whether most weights do not learn."""
    most = MOST.get(device, MOST["cpu"])
    wanted = float(most)
    if device == "cpu":
        wanted = min(most, max(LEAST_ADAPTER if adapter else LEAST_FULL, ENOUGH / flops_per_token))
    rows = max(1, most // context)
    return min(rows, 1 << max(0, math.ceil(wanted / context) - 1).bit_length())

"""The work of a training: the operations of its matrix products, and the rest of its time as the operations that take as long.

A machine does about the same work per second in all trainings, so the time of one follows from that of another.
"""

# Of the rest: per step, and per position. Measured on 2 idle cores in bf16: 2,048 positions of 9.3 and 33.8 GFLOP in 0.073 and
# 0.211 s, 4,096 of 18.5 and 67.7 in 0.105 and 0.311 s, with an adapter 9.8 and 35.3 in 0.057 and 0.153 s. Not measured on a
# GPU.
STEP_FLOPS, POSITION_FLOPS = 2.5e9, 1.0e6


def training_work(flops: float, tokens: float, *, steps: float, gpu: bool) -> float:
    """The work of a training whose matrix products have `flops` operations."""
    return flops if gpu else flops + tokens * POSITION_FLOPS + steps * STEP_FLOPS

"""How many rows a micro-batch that is "auto" has."""

import pytest

from llm.training.micro_batch import auto_rows

MEDICAL, LARGE, SMOLLM, QWEN = 4.5e6, 1.7e8, 8.6e8, 3.9e9  # operations per position: of 2.6M, 29M, 135M and 600M parameters


@pytest.mark.parametrize(
    ("flops", "context", "adapter", "expected"),
    [
        (MEDICAL, 256, False, 16),  # small models need many rows, and have the memory for them
        (LARGE, 512, False, 8),
        (SMOLLM, 512, False, 4),
        (SMOLLM, 512, True, 2),
        (QWEN, 512, True, 2),
        (QWEN, 2048, True, 1),
        (SMOLLM, 8192, True, 1),
        (SMOLLM, 100, True, 16),
    ],
)
def test_rows_are_added_as_long_as_they_pay(flops: float, context: int, adapter: bool, expected: int) -> None:
    assert auto_rows(context, flops_per_token=flops, adapter=adapter) == expected


def test_a_gpu_takes_as_many_as_keep_it_busy() -> None:
    assert auto_rows(512, flops_per_token=SMOLLM, adapter=True, device="cuda") == 128
    assert auto_rows(1 << 20, flops_per_token=SMOLLM, adapter=True, device="cuda") == 1

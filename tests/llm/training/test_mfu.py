"""The peak speed that a training is compared with: measured where that costs almost nothing, and kept."""

from pathlib import Path

import pytest
import torch

from llm.training import mfu
from llm.training.mfu import peak_flops

CPU = torch.device("cpu")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / mfu.KEPT


def test_a_short_training_does_not_measure_and_uses_what_a_long_one_measured(kept: Path) -> None:
    assert peak_flops("fp32", device=CPU, threads=1, seconds_left=1.0) is None and not kept.exists()
    found = peak_flops("fp32", device=CPU, threads=1, seconds_left=3600.0)
    assert found is not None and 1e8 < found < 1e14
    assert peak_flops("fp32", device=CPU, threads=1, seconds_left=1.0) == found
    assert peak_flops("bf16", device=CPU, threads=1, seconds_left=1.0) is None, "each precision has its own"
    assert peak_flops("fp32", device=CPU, threads=2, seconds_left=1.0) is None, "and each number of threads"


def test_the_best_measurement_is_kept(kept: Path) -> None:
    peak_flops("fp32", device=CPU, threads=1, seconds_left=3600.0)
    (file,) = kept.iterdir()
    file.write_text("1e20")
    assert peak_flops("fp32", device=CPU, threads=1, seconds_left=3600.0) == 1e20, "a machine that is busy now"

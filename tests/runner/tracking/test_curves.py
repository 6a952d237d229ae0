"""Training curves: read from metrics.jsonl, thinned and drawn."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from runner.tracking.curves import POINTS, draw, read_curves


def test_a_repeated_step_counts_once_and_broken_lines_are_skipped(tmp_path: Path) -> None:
    lines = [
        json.dumps({"step": 10, "loss": 5.0, "tokens": 80}),
        json.dumps({"step": 20, "loss": 9.0}),
        '{"step": 30, "lo',
        json.dumps({"note": "goes on"}),
        json.dumps({"step": 20, "loss": 4.0}),
        json.dumps({"step": 20, "validation_loss": 4.123456789}),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_curves(tmp_path / "metrics.jsonl") == {"loss": [(10, 5.0), (20, 4.0)], "validation_loss": [(20, 4.1235)]}


def test_a_long_curve_is_thinned_and_keeps_both_ends(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": float(step)}) for step in range(10, 30_000, 10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curve = read_curves(tmp_path / "metrics.jsonl")["loss"]
    assert len(curve) <= POINTS + 1
    assert (curve[0], curve[-1]) == ((10, 10.0), (29_990, 29_990.0))
    assert len({second[0] - first[0] for first, second in pairwise(curve[:-1])}) == 1


@pytest.mark.parametrize(("name", "begin"), [("curves.png", b"\x89PNG"), ("curves.svg", b"<?xml")])
def test_trainings_are_drawn_side_by_side(name: str, begin: bytes, tmp_path: Path) -> None:
    trainings = {
        "base": {"loss": [(1, 5.0), (2, 4.0)], "validation_loss": [(2, 4.1)]},
        "chat": {"loss": [(1, 3.0)]},
    }
    draw(trainings, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)

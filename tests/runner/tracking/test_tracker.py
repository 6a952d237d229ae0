"""The tracker process: every tracker gets the same numbers, and a failing one stops neither the run nor the others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.tracking.metrics_file import MetricsReader
from runner.tracking.tracker_process import TrackerProcess
from runner.tracking.trackers import subsets

LINES: list[dict[str, Any]] = [
    {"time": "now", "step": 10, "steps": 20, "loss": 3.0, "learning_rate": 0.1},
    {"time": "now", "step": 10, "validation_loss": 3.5},
    {"time": "now", "note": "said"},
    {"time": "now", "step": 20, "steps": 20, "loss": 2.0, "learning_rate": 0.05},
]
FACTS = {"recipe": "mine", "stage": "base", "kind": "pretrain", "key": "0" * 64, "hparams": {"seed": 1, "data": ["a"]}}
READ_BOARD = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
board = EventAccumulator(sys.argv[1]); board.Reload()
print(json.dumps({tag: [[e.step, round(e.value, 4)] for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}))
"""
READ_AIM = """
import json, sys
from aim import Repo
(run,) = [found.run for found in Repo(sys.argv[1]).query_metrics('metric.name == "loss"').iter_runs()]
names = {metric: f"{metric.context.to_dict()['subset']}/{metric.name}" for metric in run.metrics()}
values = {name: sorted(metric.values.values_list()) for metric, name in names.items()}
print(json.dumps({"experiment": run.experiment, "name": run.name, "stage": run["stage"], "values": values}))
"""


def tracked(folder: Path, to: list[Any]) -> str | None:
    """The tracker's final warning; the file is written before the tracker starts and is moved while it runs."""
    metrics, finished = folder / "work" / "metrics.jsonl", folder / "stages" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    tracker = TrackerProcess(folder, to)
    tracker.follow(MetricsReader(metrics, offset=0), finished, FACTS)
    finished.parent.mkdir()
    metrics.rename(finished)
    return tracker.close()


def read(script: str, folder: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_aim_and_tensorboard_get_the_same_values_and_a_missing_tracker_is_a_warning(tmp_path: Path) -> None:
    warning = tracked(tmp_path, ["aim", "swanlab", "tensorboard"])
    assert warning is not None and "swanlab" in warning
    assert "Traceback" in (tmp_path / "logs" / "track.log").read_text(encoding="utf-8")
    board = read(READ_BOARD, tmp_path / "tensorboard" / "mine" / f"base-{'0' * 12}")
    assert board["train/loss"] == [[10, 3.0], [20, 2.0]] and board["validation/loss"] == [[10, 3.5]]
    assert board["train/learning_rate"] == [[10, 0.1], [20, 0.05]]
    assert 0 <= board["system/memory_percent"][0][1] <= 100
    aim = read(READ_AIM, tmp_path / "aim")
    assert (aim["experiment"], aim["stage"], aim["name"]) == ("mine", "base", "mine/base 00000000")
    assert aim["values"]["train/loss"] == [2.0, 3.0] and aim["values"]["validation/loss"] == [3.5]
    assert "system/cpu_percent" in aim["values"]


def test_no_tracker_starts_no_process(tmp_path: Path) -> None:
    assert tracked(tmp_path, []) is None
    assert not (tmp_path / "logs").exists()


def test_only_numbers_are_tracked_and_validation_metrics_get_their_own_subset() -> None:
    line = {"step": 1, "loss": 2.0, "validation_loss": 3.0, "note": "x", "unit": "rows", "time": "now"}
    assert subsets(line) == {"train": {"loss": 2.0}, "validation": {"loss": 3.0}}


@pytest.mark.parametrize("name", ["mlflow", "Aim"])
def test_an_unknown_tracker_is_refused(name: str, tmp_path: Path) -> None:
    from runner.errors import RecipeError
    from runner.recipe.recipe import load_recipe

    (tmp_path / "r.toml").write_text(f'name = "r"\n[tracking]\nto = ["{name}"]\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"tracking\.to\[0\]: expected 'aim', 'tensorboard', .* got '{name}'"):
        load_recipe(tmp_path / "r.toml")

"""`run new` and `run`: two commands and no edit from people's own files to a finished model with scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from messy_data import MESSY


def two_commands(folder: Path, name: str) -> tuple[subprocess.CompletedProcess[str], dict[str, float]]:
    file, content, _ = MESSY[name]
    (folder / file).write_bytes(content)
    environment = {**os.environ, "STOCKPOT_CACHE": str(folder / "cache"), "STOCKPOT_CORES": "1"}
    words = ["new", "mine.toml", "--data", file, "--minutes", "0.01", "--yes"]
    made = subprocess.run(
        [sys.executable, "-m", "runner.cli", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    ran = subprocess.run(
        [sys.executable, "-m", "runner.cli", "run", "mine.toml"], cwd=folder, env=environment, capture_output=True, text=True
    )
    (record,) = (path for path in (folder / "cache" / "stages").glob("evaluate-*/record.json"))
    scores: dict[str, float] = json.loads(record.read_text())["metrics"]["scores"]
    return ran, scores


@pytest.mark.long  # a minute each
@pytest.mark.parametrize("name", MESSY)
def test_two_commands_lead_from_a_messy_file_to_a_model_with_scores(tmp_path: Path, name: str) -> None:
    ran, scores = two_commands(tmp_path, name)
    assert ran.returncode in (0, 4), ran.stderr  # 4: a model of seconds need not beat TF-IDF
    assert scores and all(
        name.partition(".")[0] in ("labels", "answers", "own", "general-en", "general-zh") for name in scores
    )
    if name == "texts of 4,000 tokens":
        assert 'long = "window"' in (tmp_path / "mine.toml").read_text()

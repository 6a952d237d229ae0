"""What the plan says of a stage whose last run ended badly."""

import json
from pathlib import Path

from small_recipe import Folder

from runner.artifacts import ERROR, SCRATCH
from runner.cache.store import Store
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import load_recipe


def test_a_stage_that_was_refused_runs_anew_and_one_that_was_interrupted_resumes(tmp_path: Path) -> None:
    folder = Folder(tmp_path)

    def entry() -> Entry:
        return Plan(load_recipe(folder.recipe), Store(folder.cache)).entries["corpus"]

    first = entry()
    assert first.state == "run" and first.key is not None
    scratch = Store(folder.cache).work(first.stage, first.key) / SCRATCH
    scratch.mkdir(parents=True)
    assert (entry().state, entry().reason) == ("resume", "continues where it was interrupted")
    (scratch / ERROR).write_text(json.dumps({"rank": 0, "message": "text.jsonl: expected rows, got none", "again": False}))
    assert (entry().state, entry().reason) == ("run", "was refused: text.jsonl: expected rows, got none")
    (scratch / "checkpoints" / "step-00000010").mkdir(parents=True)  # what was done before is kept
    assert entry().state == "resume"
    (scratch / "checkpoints" / "step-00000010").rmdir()
    (scratch / ERROR).write_text(json.dumps({"rank": 0, "message": "out of memory", "again": True}))
    assert entry().state == "resume"

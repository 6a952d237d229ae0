"""Prompts to try on the page: rows that a recipe holds out, for those with the key."""

import json
from pathlib import Path

from starlette.testclient import TestClient

from llm.inference.sampling import Sampling
from runner.recipe.recipe import load_recipe
from runner.serving.samples import LONGEST, SAMPLES, sample_prompts
from runner.serving.server import Server, ServerConfig

RECIPE = """
name = "organs"
[stage.base]
kind = "checkpoint"
folder = "model"
[stage.before]
kind = "evaluate"
model = "base"
tasks = [
  { name = "organ", task = "classification", files = "held_out.jsonl", prompt = "Which?\\n{text}", response = "{label}" },
]
[stage.after]
kind = "evaluate"
model = "base"
tasks = [
  { name = "organ", task = "classification", files = "held_out.jsonl", prompt = "Which?\\n{text}", response = "{label}" },
  { name = "prose", task = "text", files = "held_out.jsonl" },
]
"""


def test_a_few_short_held_out_prompts_are_offered_once_and_none_without_the_rows(tmp_path: Path) -> None:
    rows = [{"text": "x" * LONGEST if number == 0 else f"row {number}", "label": "ab"[number % 2]} for number in range(9)]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert sample_prompts(recipe) == [f"Which?\nrow {number}" for number in range(1, 1 + SAMPLES)]
    (tmp_path / "held_out.jsonl").unlink()
    assert sample_prompts(recipe) == []


def test_samples_are_for_those_with_the_key() -> None:
    config = ServerConfig(
        sampling=Sampling(), max_new_tokens=1, api_key="not-a-secret-of-16", samples=("Which?",), hosts=("testserver",)
    )
    client = TestClient(Server({}, config).app())
    assert client.get("/samples").status_code == 401
    found = client.get("/samples", headers={"Authorization": "Bearer not-a-secret-of-16"})
    assert found.json() == {"prompts": ["Which?"]}

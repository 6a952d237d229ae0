"""The kind `sft`: from a checkpoint and rows to a checkpoint that answers and stops."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from random_model import random_model

from llm.errors import InputError
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer
from runner.input_files import InputFile
from runner.stage import Context
from runner.stages.sft import FineTune

ANSWERS = {"the heart": "pumps blood", "the lungs": "breathe air", "the liver": "cleans"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model that has learned nothing yet."""
    return random_model(tmp_path / "base", [*ANSWERS, *ANSWERS.values()], hidden_size=32, context=32)


@pytest.fixture
def rows(tmp_path: Path) -> InputFile:
    """Three questions and their answers, many times."""
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in ANSWERS.items()] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return InputFile("rows.jsonl", tmp_path)


def stage_of(rows: InputFile, **changes: Any) -> FineTune:
    fields = {
        "model": "base",
        "data": [{"files": rows}],
        "batch_tokens": 64,
        "budget": {"steps": 60},
        "schedule": {"learning_rate": 2e-2, "warmup_steps": 5},
        "seed": 1,
    }
    return FineTune.model_validate(fields | changes)


@pytest.mark.parametrize(("wanted", "stored"), [("base", torch.bfloat16), ("fp32", torch.float32)])
def test_a_fine_tuned_model_keeps_the_precision_of_its_base_unless_another_is_asked_for(
    base: Path, rows: InputFile, make_context: Callable[..., Context], wanted: str, stored: torch.dtype
) -> None:
    save_checkpoint(base, load_checkpoint(base), base, dtype=torch.bfloat16)
    context = make_context(inputs={"base": base})
    stage = stage_of(rows, dtype=wanted, budget={"steps": 1})
    stage.prepare(context)
    stage.run(context)
    assert {weight.dtype for weight in load_checkpoint(context.work, dtype=None).parameters()} == {stored}


def test_it_learns_the_answers_and_to_stop_after_them(
    base: Path, rows: InputFile, make_context: Callable[..., Context]
) -> None:
    context = make_context(inputs={"base": base})
    stage = stage_of(rows, validation=[{"files": rows}])
    stage.prepare(context)
    metrics = stage.run(context)
    assert metrics["data"]["rows"] == 24
    assert metrics["data"]["real_share"] > 0.8  # few lengths, and a row holds two or three
    assert metrics["validation_data"]["chats"] == 24

    model, tokenizer = load_checkpoint(context.work), TextTokenizer.load(context.work)
    for prompt, response in ANSWERS.items():
        ids = tokenizer.encode_prompt([{"role": "user", "content": prompt}])
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == tokenizer.end:
                break
        assert tokenizer.decode(ids, special=True) == f"<|begin|><|user|>{prompt}<|assistant|>{response}<|end|>"


def test_packed_rows_are_not_packed_again(base: Path, rows: InputFile, make_context: Callable[..., Context]) -> None:
    context = make_context(inputs={"base": base})
    stage = stage_of(rows)
    stage.prepare(context)
    packed = {path: path.stat().st_mtime_ns for path in (context.scratch / "rows").iterdir()}
    stage.prepare(context)
    assert {path: path.stat().st_mtime_ns for path in (context.scratch / "rows").iterdir()} == packed


def test_rows_may_be_shorter_than_the_model_allows_but_not_longer(
    base: Path, rows: InputFile, make_context: Callable[..., Context]
) -> None:
    context = make_context(inputs={"base": base})
    with pytest.raises(InputError, match="context: expected at most 32, the positions of the model, got 64"):
        stage_of(rows, context=64).prepare(context)
    stage_of(rows, context=16).prepare(context)
    packed = json.loads((context.scratch / "rows" / "statistics.json").read_text())
    assert packed["tokens"] <= 16 * packed["chats"] and packed["row_length"] % 16 == 0


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"prompt": "{text"}, "is not a template"),
        ({"response": "label"}, "'label': expected the name of a field in braces"),
        ({"messages": "chat", "prompt": "{text}"}, "expected either messages or prompt and response, got both"),
        ({"weight": 0}, "greater than 0"),
        ({"on_bad_row": "ignore"}, "'fail' or 'skip'"),
    ],
)
def test_a_wrong_table_is_a_fault_of_the_recipe(table: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        stage_of(InputFile("rows.jsonl", Path()), data=[{"files": "rows.jsonl", **table}])


def test_neither_planning_nor_packing_imports_torch(base: Path, rows: InputFile) -> None:
    code = f"""
import sys
from pathlib import Path
import runner.stages.sft, runner.stages.lora, runner.stages.merge
heavy = {{"torch", "numpy", "transformers", "peft"}} & set(sys.modules)
assert not heavy, heavy
from llm.data.chat_dataset import write_rows
from llm.data.chat_parts import Table
from llm.tokenizer.tokenizer import TextTokenizer
from llm.data.conversations import Template
write_rows(
    Path({str(rows.folder / "packed")!r}), [Table((Path({rows.pattern!r}),), Template())],
    tokenizer=TextTokenizer.load(Path({str(base)!r})), context=32, report=lambda **values: None, should_stop=lambda: False,
)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)

"""The chats of a stage as packed rows for a model that is not one of its recipe, for `run bench --model`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runner.artifacts import Checkpoint
from runner.resources import available_cores
from runner.stage import Context, Parallel
from runner.stages import stage_kinds
from runner.stages.fields.chat_training import ROWS, PackedTraining


def packed_rows(kind: str, fields: Mapping[str, Any], base: Path, scratch: Path, *, say: Callable[[str], None]) -> Path | None:
    """The folder of the rows of a stage of this `kind` and these `fields`, tokenized for the checkpoint `base`."""
    stage = stage_kinds()[kind].model_validate(fields)
    assert isinstance(stage, PackedTraining)
    if not stage.tables()[0]:
        return None
    say("packing the chats of the recipe")
    context = Context(
        name="bench",
        work=scratch,
        scratch=scratch,
        inputs={},
        records={},
        recipe="",
        parallel=Parallel(),
        cores=available_cores(),
        report=lambda **values: None,
        should_stop=lambda: False,
    )
    scratch.mkdir()
    stage.pack(context, Checkpoint(base))
    return scratch / ROWS

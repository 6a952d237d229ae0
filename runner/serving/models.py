"""Which models of a recipe one can talk to, and where they lie: what `run chat` and `run serve` share."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.artifacts import Adapter, Checkpoint, Release
from runner.errors import RecipeError
from runner.graph import edges
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.resources import available_cores

if TYPE_CHECKING:
    from llm.inference.chat_session import ChatSession

TALKS = (Checkpoint, Release, Adapter)


@dataclass(frozen=True)
class Talker:
    """A finished stage that one can talk to."""

    name: str
    checkpoint: Path
    adapter: Path | None = None  # put over the checkpoint
    made: str = ""  # when, as its record says

    def open(self, *, compiled: Path | None = None) -> "ChatSession":
        """The model, loaded; imports torch. `compiled` is where compiled code is kept, if it is to write with such."""
        if compiled is not None:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
        from llm.inference.chat_session import ChatSession

        return ChatSession(self.checkpoint, self.adapter, compiled=compiled is not None)


def talkers(recipe: Recipe, plan: Plan, names: Sequence[str] = ()) -> list[Talker]:
    """The finished stages `names`; without any, the last that makes a checkpoint. RecipeError where there is none."""
    able = [entry for entry in plan if issubclass(entry.stage.makes, TALKS) and plan.is_in_use(entry.name)]
    finished = [entry.name for entry in able if entry.path is not None]
    if not names:
        last = [entry.name for entry in able if entry.path is not None and entry.stage.makes is Checkpoint]
        if not last:
            raise RecipeError(f"{recipe.path}: expected a finished model to talk to, got none; `run {recipe.path}` makes one")
        names = last[-1:]
    return [_talker(recipe, plan, name, finished) for name in names]


def _talker(recipe: Recipe, plan: Plan, name: str, finished: Sequence[str]) -> Talker:
    entry = plan.named(name)
    hint = f"; these are: {', '.join(finished)}" if finished else ""
    if not issubclass(entry.stage.makes, TALKS):
        raise RecipeError(
            f"{name}: expected a stage that makes a model to talk to, but it makes {entry.stage.makes.__name__}{hint}"
        )
    if entry.path is None:
        raise RecipeError(f"{name}: expected a finished model, but its state is {entry.state!r}{hint}")
    if not issubclass(entry.stage.makes, Adapter):
        return Talker(name, entry.path, made=_made(entry))
    base = next(str(ref) for _, ref in edges(entry.stage) if issubclass(ref.artifact, Checkpoint))
    folder = plan.entries[base].path
    if folder is None:
        raise RecipeError(
            f"{name}: expected the model that it adapts, {base!r}, but that one's state is {plan.entries[base].state!r}"
        )
    return Talker(name, folder, entry.path, made=_made(entry))


def _made(entry: Entry) -> str:
    return str(entry.record.data["finished"]) if entry.record else ""

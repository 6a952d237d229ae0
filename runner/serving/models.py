"""The servable models of a recipe, for `run chat` and `run serve`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runner.artifacts import Adapter, Checkpoint, Release
from runner.compiled_code import VARIABLE, compiled_folder
from runner.errors import RecipeError
from runner.graph import edges
from runner.planning.plan import Entry, Plan
from runner.recipe.recipe import Recipe
from runner.resources import available_cores

if TYPE_CHECKING:
    from llm.evaluation.prediction import Predictor
    from llm.inference.chat_session import ChatSession

SERVABLE = (Checkpoint, Release, Adapter)


@dataclass(frozen=True)
class ServableModel:
    """A finished stage that makes a model for chat or completion."""

    name: str
    checkpoint: Path
    adapter: Path | None = None  # applied to the checkpoint
    made: str = ""  # time, from its record

    def open(self, *, precision: Literal["auto", "fp32", "bf16"] = "auto", compiled: bool = False) -> "ChatSession":
        """Loads the model; imports torch. `compiled` compiles the decoding step first."""
        if compiled:
            os.environ[VARIABLE] = str(compiled_folder())
        _use_cores()
        from llm.inference.chat_session import ChatSession

        return ChatSession(self.checkpoint, self.adapter, precision=precision, compiled=compiled)

    def predictor(self, *, precision: Literal["auto", "fp32", "bf16"] = "auto") -> "Predictor":
        """Loads the model to predict for many rows; imports torch."""
        _use_cores()
        from llm.evaluation.prediction import Predictor
        from llm.inference.chat_session import load_model

        model, tokenizer = load_model(self.checkpoint, self.adapter, precision=precision)
        return Predictor(model, tokenizer, model.decoding())


def _use_cores() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))


def finished_checkpoints(plan: Plan) -> list[Entry]:
    """The finished stages that make a checkpoint, but for branches that are not used."""
    return [entry for entry in plan if entry.path and entry.stage.makes is Checkpoint and plan.is_in_use(entry.name)]


def needed_for(plan: Plan, names: Sequence[str] = ()) -> list[Entry]:
    """The stages whose artifacts `servable_models` opens: `names`, by default the last one known to have made a checkpoint."""
    made = [entry for entry in plan if entry.record and entry.stage.makes is Checkpoint and plan.is_in_use(entry.name)]
    chosen = [plan.named(name) for name in names] or made[-1:]
    adapters = [entry for entry in chosen if issubclass(entry.stage.makes, Adapter)]
    bases = [
        plan.entries[str(ref)] for entry in adapters for _, ref in edges(entry.stage) if issubclass(ref.artifact, Checkpoint)
    ]
    return [*chosen, *bases]


def servable_models(recipe: Recipe, plan: Plan, names: Sequence[str] = ()) -> list[ServableModel]:
    """The finished stages `names`, by default the last one that makes a checkpoint. RecipeError if there is none."""
    candidates = [entry for entry in plan if issubclass(entry.stage.makes, SERVABLE) and plan.is_in_use(entry.name)]
    finished = [entry.name for entry in candidates if entry.path is not None]
    if not names:
        checkpoints = finished_checkpoints(plan)
        if not checkpoints:
            known = any(entry.record and entry.stage.makes is Checkpoint for entry in plan)
            pull = ", and `run pull` fetches it from a remote that has it" if known else ""
            raise RecipeError(f"{recipe.path}: expected a finished model, got none; `run {recipe.path}` makes one{pull}")
        names = [checkpoints[-1].name]
    return [_servable_model(recipe, plan, name, finished) for name in names]


def _servable_model(recipe: Recipe, plan: Plan, name: str, finished: Sequence[str]) -> ServableModel:
    entry = plan.named(name)
    hint = f"; finished models: {', '.join(finished)}" if finished else ""
    if not issubclass(entry.stage.makes, SERVABLE):
        raise RecipeError(
            f"{name}: expected a stage that makes a model, got one that makes {entry.stage.makes.__name__}{hint}"
        )
    if entry.path is None:
        pull = "; `run pull` fetches it from a remote that has it" if entry.record else ""
        raise RecipeError(f"{name}: expected a finished model, got the state {entry.state!r}{pull}{hint}")
    if not issubclass(entry.stage.makes, Adapter):
        return ServableModel(name, entry.path, made=_made(entry))
    base = next(str(ref) for _, ref in edges(entry.stage) if issubclass(ref.artifact, Checkpoint))
    folder = plan.entries[base].path
    if folder is None:
        raise RecipeError(
            f"{name}: expected its base model {base!r} to be finished, got the state {plan.entries[base].state!r}"
        )
    return ServableModel(name, folder, entry.path, made=_made(entry))


def _made(entry: Entry) -> str:
    return str(entry.record.data["finished"]) if entry.record else ""

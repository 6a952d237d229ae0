"""Which engine a run uses: `--engine`, else STOCKPOT_ENGINE, else the user's file, else this machine."""

import os

from runner.engine.interface import Engine
from runner.engine.settings import Settings, read_settings, settings_file
from runner.errors import RecipeError

VARIABLE = "STOCKPOT_ENGINE"
KINDS = ("local", "slurm")


def chosen_kind(option: str | None, settings: Settings) -> tuple[str, str]:
    """The engine and what chose it: `--engine`, else STOCKPOT_ENGINE, else the file, else nothing."""
    for kind, place in ((option, "--engine"), (os.environ.get(VARIABLE), VARIABLE)):
        if kind:
            if kind not in KINDS:
                raise RecipeError(f"{place}: expected one of {', '.join(KINDS)}, got {kind!r}")
            return kind, place
    return settings.kind, str(settings_file()) if settings_file().exists() else "the default"


def engine_of(option: str | None, *, nodes: int = 1) -> Engine:
    """The engine of a run whose trainings have so many nodes; RecipeError if it has no more than this machine."""
    settings = read_settings()
    kind, _ = chosen_kind(option, settings)
    if kind == "slurm":
        from runner.engine.slurm import SlurmEngine

        return SlurmEngine(settings.slurm)
    if nodes > 1:
        raise RecipeError(
            f"parallel.nodes: expected 1 on this machine alone, got {nodes}; --engine slurm trains on the nodes of a cluster"
        )
    from runner.engine.local import LocalEngine

    return LocalEngine()

"""Everything that a run reports as a fault; the class decides the exit code.

    StockpotError
    ├── RecipeError   2  the recipe, or a file that it names, is wrong
    ├── StageError    3  a stage failed while it ran
    ├── DamageError   3  the cache does not hold what was recorded
    ├── RemoteError   3  a cache or a published recipe elsewhere was asked for and could not be used
    ├── GateError     4  a gate on a score failed
    └── PausedError   5  an alert asked for a person

Messages name the place, what was found and what was wanted. `llm` knows none of these: there a fault of the user's
data is an `llm.errors.InputError`, which the worker turns into a StageError with the stage's name.
"""


class StockpotError(Exception):
    """Root of all faults that end a run with a message instead of a traceback."""

    exit_code = 1


class RecipeError(StockpotError):
    """The recipe cannot be run as written. Holds every fault found, one line each."""

    exit_code = 2


class StageError(StockpotError):
    """A stage started and did not finish. What it had checkpointed stays in its work folder."""

    exit_code = 3


class DamageError(StockpotError):
    """Something in the cache is not what was recorded. Names every file; what could be used by mistake is set aside."""

    exit_code = 3


class RemoteError(StockpotError):
    """A cache or a recipe elsewhere could not be read or written. Fails what was only about it, never a run."""

    exit_code = 3


class GateError(StockpotError):
    """A score missed what the recipe asked of it; nothing that depends on it is published."""

    exit_code = 4


class PausedError(StockpotError):
    """An alert stopped a training after a checkpoint; the next run continues from it."""

    exit_code = 5


class MachineLostError(StageError):
    """A machine that took part is gone, or did not come back in time; what was checkpointed is kept."""


class PeerFailedError(StageError):
    """The processes of another machine failed."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again  # whether trying again may help

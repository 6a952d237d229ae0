"""The errors of the runner; the class decides the exit code.

    StockpotError
    ├── RecipeError     2  the recipe, or a file that it names, is wrong
    ├── StageError      3  a stage failed while it ran
    ├── IntegrityError  3  a file of the cache differs from its record
    ├── RemoteError     3  a remote cache or a published recipe could not be used
    ├── GateError       4  a gate on a score failed
    └── PausedError     5  an alert paused a training

A message has the form `PLACE: expected X, got Y`, with a cure where it is not obvious. In `llm` an error of the user's data is
an `llm.errors.InputError`, which the worker reports as a StageError with the stage's name.
"""

EXIT_INTERRUPTED = 130


class StockpotError(Exception):
    """Root of all errors that end a run with a message instead of a traceback."""

    exit_code = 1


class RecipeError(StockpotError):
    """The recipe cannot be run as written. The message has one line per error."""

    exit_code = 2


class StageError(StockpotError):
    """A stage started and did not finish. Its checkpoints stay in its work folder."""

    exit_code = 3


class IntegrityError(StockpotError):
    """Files of the cache differ from their record. The message names each of them; damaged artifacts are set aside."""

    exit_code = 3


class RemoteError(StockpotError):
    """A remote cache or a published recipe could not be read or written. It fails `push` and `pull`, never a run."""

    exit_code = 3


class GateError(StockpotError):
    """A score missed a gate of the recipe; nothing that depends on it is published."""

    exit_code = 4


class PausedError(StockpotError):
    """An alert paused a training after a checkpoint; the next run continues from it."""

    exit_code = 5

"""The exceptions of `llm`: bad input, too little memory, and a run that was asked to stop."""


class InputError(ValueError):
    """Data or settings cannot be used. The message names the file and line (or the value), what was expected and what it
    got."""


class Interrupted(Exception):  # noqa: N818  # not an error
    """The run was asked to stop. Its work is checkpointed; running again continues from there."""


class Paused(Exception):  # noqa: N818  # not an error
    """An alert paused the run for a person to look at it. Its work is checkpointed; running again continues from there."""


class MemoryShortageError(RuntimeError):
    """One process of a group ran out of memory. A restarted training uses at most `micro_batch` rows at a time."""

    def __init__(self, message: str, *, micro_batch: int) -> None:
        super().__init__(message)
        self.micro_batch = micro_batch

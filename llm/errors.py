"""What `llm` raises on purpose: a fault in what the user gave it, a shortage that beginning again cures, and the end of a run
that was asked to end.
"""


class InputError(ValueError):
    """Data or settings cannot be used. The message names file and line (or the value), what was found and what was wanted."""


class Interrupted(Exception):  # noqa: N818  # it is no error
    """The run was asked to end, and what was computed is checkpointed; running again continues from there."""


class Paused(Exception):  # noqa: N818  # it is no error
    """An alert asks for a person; what was computed is checkpointed, and running again continues from there."""


class MemoryShortageError(RuntimeError):
    """Memory ran out in one process of a group. Begun again, the training takes no more than `micro_batch` rows at a time."""

    def __init__(self, message: str, *, micro_batch: int) -> None:
        super().__init__(message)
        self.micro_batch = micro_batch

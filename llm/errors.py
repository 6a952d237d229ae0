"""What `llm` raises on purpose: a fault in what the user gave it, and the end of a run that was asked to end."""


class InputError(ValueError):
    """Data or settings cannot be used. The message names file and line (or the value), what was found and what was wanted."""


class Interrupted(Exception):  # noqa: N818  # it is no error
    """The run was asked to end, and what was computed is checkpointed; running again continues from there."""

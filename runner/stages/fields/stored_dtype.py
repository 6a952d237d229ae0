"""The field `dtype` of kinds that write a checkpoint on the basis of another: the precision in which weights are stored."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

StoredDtype = Literal["base", "fp32", "bf16", "fp16"]


def resolve_dtype(wanted: StoredDtype, base: Path) -> "torch.dtype":
    """The dtype to store; "base" is that of the checkpoint in the folder `base`. Imports torch."""
    import torch

    from llm.models.checkpoint import stored_dtype

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(wanted) or stored_dtype(base)

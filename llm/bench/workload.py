"""What is measured: the sizes of a model and of its training step. No torch: the process that starts the bench reads it."""

from typing import TYPE_CHECKING, Any, Literal

from llm.models import architecture_tables
from llm.training.config import ConfigTable, Optimizer

if TYPE_CHECKING:
    from llm.models.interface import ModelConfig as ArchitectureConfig
else:
    ArchitectureConfig = architecture_tables()


class Workload(ConfigTable):
    """A model and one optimizer step of its training."""

    architecture: ArchitectureConfig
    """Its `context` is that of the rows where the recipe leaves it open."""
    vocab_size: int
    context: int
    """Tokens in a row."""
    rows: int
    """Rows of an optimizer step."""
    micro_batch: int | Literal["auto"] = "auto"
    """Rows of a forward pass."""
    optimizer: Optimizer = Optimizer()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compiled: bool | Literal["auto"] = "auto"
    """Our layers; "auto" is what a long training decides."""
    fused_attention: bool | Literal["auto"] = "auto"
    """Our attention, in the same way."""
    recompute: bool = False
    adapter: dict[str, Any] | None = None
    """The adapter that learns, as the fields of `llm.adapters.lora.LoraConfig`; without one all weights learn."""
    quantize: bool = False
    """Whether the base of the adapter is in four bits."""
    folder: str | None = None
    """A model folder with the weights; without one they are drawn."""
    rows_folder: str | None = None
    """Packed chats to learn from; without them rows are made up."""
    cores: int
    """Threads of the step."""

    @property
    def tokens_per_step(self) -> int:
        """Positions of an optimizer step."""
        return self.rows * self.context


def reference_workload(*, cores: int, compiled: bool | Literal["auto"] = "auto") -> Workload:
    """The workload without a recipe: 28.8M parameters, 8 rows of one 512-token document."""
    sizes = {"hidden_size": 512, "layers": 8, "heads": 8, "context": 512}
    step = {"vocab_size": 6144, "context": 512, "rows": 8, "compiled": compiled, "fused_attention": compiled, "cores": cores}
    return Workload.model_validate({"architecture": sizes} | step)

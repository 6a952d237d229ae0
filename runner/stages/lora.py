"""The kind `lora`: training of a low-rank adapter of a checkpoint; over a base in four bits it is QLoRA."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from llm.training.config import Optimizer
from runner.artifacts import Adapter, Checkpoint
from runner.stage import Context, Execution, Metrics, Parallel, Ref, Semantic
from runner.stages.fields.adapter import AdapterFields
from runner.stages.fields.chat_training import RowTraining
from runner.stages.fields.training import is_main_process

if TYPE_CHECKING:
    from llm.models.interface import LanguageModel
    from llm.training.validation import Validation


class TrainAdapter(RowTraining, AdapterFields, kind="lora", version=3, makes=Adapter):
    """Trains a LoRA adapter (Hu et al. 2021), which stock PEFT opens on the stock base."""

    imports = ("llm.training.trainer", "peft")

    base: Semantic[Ref[Checkpoint]]
    """The model to adapt; its weights do not change."""
    quantize: Semantic[Literal["nf4"] | None] = None
    """Keep the base in 4-bit NormalFloat while training (QLoRA, Dettmers et al. 2023). The adapter is merged into the full
    weights."""
    double_quantize: Semantic[bool] = True
    """For "nf4": quantize the scales of the blocks as well."""
    compute_dtype: Execution[Literal["auto", "fp32", "bf16"]] = "auto"
    """For "nf4": precision of products with the unpacked weights; "auto" is the precision of the training."""

    @field_validator("optimizer")
    @classmethod
    def _is_adamw(cls, optimizer: Optimizer) -> Optimizer:
        if optimizer.kind != "adamw":
            raise ValueError(
                f'kind: expected "adamw", got {optimizer.kind!r}, which is for whole matrices, not for factors of an adapter'
            )
        return optimizer

    def parallel_fault(self, parallel: Parallel) -> str | None:
        """A base in four bits cannot be sharded."""
        if self.quantize is None or parallel.strategy != "fsdp" or parallel.processes == 1:
            return None
        return f'quantize: expected parallel.strategy = "ddp" beside "{self.quantize}", got "fsdp"'

    def prepare(self, context: Context) -> None:
        """Pack the rows, and those mixed into them."""
        self.prepare_rows(context, context.open(self.base))

    def run(self, context: Context) -> Metrics:
        """Attach an adapter, train it, and write it."""
        import torch

        from llm.adapters import lora
        from llm.models.checkpoint import load_checkpoint

        base = context.open(self.base)
        model = load_checkpoint(base.folder, dtype=None)
        if self.quantize is not None:
            compute = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[self.compute_dtype]
            lora.quantize(model, double=self.double_quantize, compute_dtype=compute)
        lora.attach(model, self.adapter, seed=self.seed)
        metrics = self.learn_mixed(context, model, base)
        metrics["trained_share"] = metrics["trained_parameters"] / metrics["parameters"]
        held_out = self.held_out(context)
        if self.quantize is not None and held_out is not None:
            metrics["merge_losses"] = self._merge_losses(context, model, held_out, metrics)
        if is_main_process():
            lora.save_adapter(context.work, model)
        return metrics

    def _merge_losses(
        self, context: Context, model: "LanguageModel", held_out: "Validation", metrics: dict[str, Any]
    ) -> dict[str, float]:
        """The held-out loss of the adapter over four bits, merged into the full weights, and into the unpacked four bits."""
        from llm.adapters import lora
        from llm.adapters.merge import merge_attached
        from llm.models.checkpoint import load_checkpoint
        from llm.training.runtime import Runtime
        from llm.training.validation import validate_model

        found = {"unmerged": metrics["validation_loss"]}
        for name, dequantized in (("merged", False), ("merged_dequantized", True)):
            merged = load_checkpoint(context.open(self.base).folder)
            if dequantized:
                lora.copy_dequantized(model, merged)
            lora.copy_adapter(model, merged)
            merge_attached(merged)
            runtime = Runtime(**metrics["choices"])
            measured = validate_model(merged, held_out, runtime=runtime, should_stop=context.should_stop)
            found[name] = measured["validation_loss"]
        return found

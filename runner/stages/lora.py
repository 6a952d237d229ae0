"""The kind `lora`: training of a low-rank adapter of a checkpoint; over a base in four bits it is QLoRA."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llm.training.config import Optimizer
from runner.artifacts import Adapter, Checkpoint, Tokens
from runner.stage import Context, Execution, Metrics, Parallel, Ref, Semantic
from runner.stages.fields.adapter import AdapterFields
from runner.stages.fields.chat_training import RowTraining
from runner.stages.fields.data_tables import TrainingTable
from runner.stages.fields.packed_text import check_tokenizer, held_out_text
from runner.stages.fields.training import is_main_process

if TYPE_CHECKING:
    from llm.data.batch import RowSource
    from llm.models.interface import LanguageModel
    from llm.training.validation import Validation


class TrainAdapter(RowTraining, AdapterFields, kind="lora", version=5, makes=Adapter):
    """Trains a LoRA adapter (Hu et al. 2021), which stock PEFT opens on the stock base."""

    imports = ("llm.training.trainer", "peft")

    base: Semantic[Ref[Checkpoint]]
    """The model to adapt; its weights do not change."""
    data: Semantic[list[TrainingTable]] = Field(default_factory=list)
    """The rows to learn from. Loss is on the assistant's text and the end of its turns."""
    tokens: Semantic[Ref[Tokens] | None] = None
    """Instead of data: text, packed with the tokenizer of `base`, to continue pretraining on. Loss is on all of it, and its
    held-out documents are those to validate on."""
    quantize: Semantic[Literal["nf4"] | None] = None
    """Keep the base in 4-bit NormalFloat while training (QLoRA, Dettmers et al. 2023). The adapter is merged into the full
    weights."""
    double_quantize: Semantic[bool] = True
    """For "nf4": quantize the scales of the blocks as well."""
    compute_dtype: Execution[Literal["auto", "fp32", "bf16"]] = "auto"
    """For "nf4": precision of products with the unpacked weights; "auto" is the precision of the training."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.data) == (self.tokens is not None):
            raise ValueError("expected either data or tokens, got both" if self.data else "data or tokens: is missing")
        if self.tokens is not None and self.validation:
            raise ValueError("validation: expected none beside tokens, which have held-out documents, got some")
        return self

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

    @property
    def holds_out(self) -> bool:
        """Whether its record has a loss on held-out rows."""
        return bool(self.validation) or self.tokens is not None

    def prepare(self, context: Context) -> None:
        """Pack the rows, and those mixed into them."""
        base = context.open(self.base)
        if self.tokens is not None:
            check_tokenizer(context, self.tokens, base.tokenizer, place="tokens", owner=str(self.base))
        self.prepare_rows(context, base)

    def own_rows(self, context: Context) -> "RowSource":
        """The rows to learn from."""
        if self.tokens is None:
            return super().own_rows(context)
        from llm.data.token_rows import TokenRows

        rows = TokenRows(context.open(self.tokens).train, seed=self.seed)
        length = min(rows.context, self.positions(context.open(self.base)))
        return rows if length == rows.context else TokenRows(context.open(self.tokens).train, context=length, seed=self.seed)

    def held_out(self, context: Context, *, watched: Sequence[str] = ()) -> "Validation | None":
        """The held-out rows, or documents of `tokens`; None if there are none."""
        if self.tokens is None:
            return super().held_out(context, watched=watched)
        length = self.own_rows(context).context
        return held_out_text(context.open(self.tokens), length, most=self.validation_tokens, every=self.validate_every)

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

"""The kind `lora`: a low-rank adapter of a checkpoint learns, and nothing else; over a base in four bits it is QLoRA."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from llm.settings import Optimizer
from runner.artifacts import Adapter, Checkpoint
from runner.stage import Context, Execution, Metrics, Parallel, Ref, Semantic
from runner.stages.data import RowTraining
from runner.stages.training import is_main_process


class TrainAdapter(RowTraining, kind="lora", version=2, makes=Adapter):
    """Trains a LoRA adapter through PEFT (Hu et al. 2021); it opens in stock PEFT on the stock base."""

    base: Semantic[Ref[Checkpoint]]
    """The model that is adapted and stays as it is."""
    r: Semantic[Annotated[int, Field(gt=0)]] = 8
    """Rank of the update of each matrix."""
    alpha: Semantic[Annotated[int, Field(gt=0)]] = 16
    """The update counts alpha / r."""
    dropout: Semantic[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Share of the channels that the adapter does not see while training."""
    target_modules: Semantic[Annotated[list[str], Field(min_length=1)] | Literal["all-linear"]] = "all-linear"
    """Names of the layers that get an adapter, or ends of names, as ["q_proj", "layers.0.mlp.up_proj"]. "lm_head" is one where
    the base is not tied; "all-linear" is all but the head."""
    rslora: Semantic[bool] = False
    """The update counts alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    dora: Semantic[bool] = False
    """Learn length and direction of each row of the matrices apart (Liu et al. 2024)."""
    quantize: Semantic[Literal["nf4"] | None] = None
    """Hold the base in 4-bit NormalFloat while training (QLoRA, Dettmers et al. 2023); merging is into the full weights."""
    double_quantize: Semantic[bool] = True
    """Of "nf4": quantize the scales of the blocks as well."""
    compute_dtype: Execution[Literal["auto", "fp32", "bf16"]] = "auto"
    """Of "nf4": what products with the unpacked weights are computed in; "auto" is the training's own precision."""

    @field_validator("target_modules")
    @classmethod
    def _head_without_dropout(cls, targets: list[str] | str, info: ValidationInfo) -> list[str] | str:
        if "lm_head" in targets and info.data.get("dropout"):  # said here too, before a base is trained for it
            raise ValueError('names "lm_head", whose adapter has no dropout; wants dropout = 0 beside it, or other layers')
        return targets

    @field_validator("optimizer")
    @classmethod
    def _is_adamw(cls, optimizer: Optimizer) -> Optimizer:
        if optimizer.kind != "adamw":
            raise ValueError(
                f'kind wants "adamw"; found {optimizer.kind!r}, which is for whole matrices, not for the factors of an adapter'
            )
        return optimizer

    def parallel_fault(self, parallel: Parallel) -> str | None:
        """A base in four bits is not spread over processes."""
        if self.quantize is None or parallel.strategy != "fsdp" or parallel.processes == 1:
            return None
        return f'quantize: found "{self.quantize}" beside parallel.strategy = "fsdp", wants strategy = "ddp" or no quantize'

    def prepare(self, context: Context) -> None:
        """Pack the rows."""
        self.pack(context, context.open(self.base))

    def run(self, context: Context) -> Metrics:
        """Attach an adapter, train it, and write it."""
        import torch

        from llm import lora
        from llm.checkpoint import load_checkpoint
        from llm.choices import Choices
        from llm.validation import measure_model

        base = context.open(self.base)
        model = load_checkpoint(base.folder)
        if self.quantize is not None:
            compute = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[self.compute_dtype]
            lora.quantize(model, double=self.double_quantize, compute_dtype=compute)
        settings = lora.Settings(
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            rslora=self.rslora,
            dora=self.dora,
        )
        lora.attach(model, settings, seed=self.seed)
        metrics = self.learn_rows(context, model)
        metrics["trained_share"] = metrics["trained_parameters"] / metrics["parameters"]
        held_out = self.held_out(context)
        if self.quantize is not None and held_out is not None:
            # `validation_loss` is over the base in four bits; this is over the weights that the adapter is merged into.
            full = load_checkpoint(base.folder)
            lora.copy_adapter(model, full)
            choices = Choices(**metrics["choices"])
            found = measure_model(full, held_out, choices=choices, should_stop=context.should_stop)
            metrics["full_precision_validation_loss"] = found["validation_loss"]
        if is_main_process():
            lora.save_adapter(context.work, model)
        return metrics

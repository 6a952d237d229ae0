"""The kind `lora`: a low-rank adapter of a checkpoint learns, and nothing else; over a base in four bits it is QLoRA."""

from typing import Annotated, Literal

from pydantic import Field

from runner.artifacts import Adapter, Checkpoint
from runner.stage import Context, Execution, Metrics, Ref, Semantic
from runner.stages.data import RowTraining
from runner.stages.training import is_main_process


class TrainAdapter(RowTraining, kind="lora", version=1, makes=Adapter):
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
    """Names of the modules that get an adapter, as ["q_proj", "v_proj"]; or all linear layers but the head."""
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

    def prepare(self, context: Context) -> None:
        """Pack the rows."""
        self.pack(context, context.open(self.base))

    def run(self, context: Context) -> Metrics:
        """Attach an adapter, train it, and write it."""
        import torch

        from llm import lora
        from llm.checkpoint import load_checkpoint

        model = load_checkpoint(context.open(self.base).folder)
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
        learned, parameters = lora.count_parameters(model)
        metrics = self.learn_rows(context, model)
        if is_main_process():
            lora.save_adapter(context.work, model)
        return metrics | {"parameters": parameters, "trained_parameters": learned, "trained_share": learned / parameters}

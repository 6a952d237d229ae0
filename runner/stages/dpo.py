"""The kind `dpo`: a model learns which of two answers is preferred (direct preference optimisation, Rafailov et al. 2023).

    [stage.preferred]
    kind = "dpo"
    model = "chat"
    data = [{ files = "data/preferences.jsonl.gz" }]    # rows of prompt, chosen and rejected
    lora = { r = 8, alpha = 16 }                        # without it, all weights learn

The training loop is that of the other kinds; the objective is in `llm.training.dpo`.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from llm.training.config import Schedule
from runner.artifacts import Checkpoint
from runner.stage import Context, Metrics, Ref, Semantic
from runner.stages.fields.adapter import AdapterFields
from runner.stages.fields.chat_training import ROWS, VALIDATION_ROWS, PackedTraining
from runner.stages.fields.data_tables import PreferenceTable
from runner.stages.fields.stored_dtype import StoredDtype, resolve_dtype
from runner.stages.fields.training import is_main_process


class LearnPreferences(PackedTraining, kind="dpo", version=4, makes=Checkpoint):
    """Trains a model on pairs of answers, one of them preferred; the model before the training is the reference."""

    model: Semantic[Ref[Checkpoint]]
    """The model to train, which is also the reference."""
    data: Semantic[Annotated[list[PreferenceTable], Field(min_length=1)]]
    """The pairs. Both answers of a row are in the same step."""
    validation: Semantic[list[PreferenceTable]] = Field(default_factory=list)
    """Held-out pairs: in which share of them the preferred answer has the higher reward (`validation_reward_accuracy`), and by
    how much (`validation_reward_margin`, times beta)."""
    beta: Semantic[Annotated[float, Field(gt=0)]] = 0.1
    """Weight of the penalty for moving away from the reference."""
    label_smoothing: Semantic[Annotated[float, Field(ge=0, lt=0.5)]] = 0.0
    """Share of the pairs whose labels are assumed to be swapped (Mitchell 2023)."""
    lora: Semantic[AdapterFields | None] = None
    """An adapter to train instead of all weights; it is merged into them at the end."""
    dtype: Semantic[StoredDtype] = "base"
    """Precision in which the weights are stored; "base" is that of `model`. They are trained in fp32."""
    schedule: Semantic[Schedule] = Schedule(learning_rate=1e-5)
    """The learning rate over the training: much lower than in other trainings, about ten times higher for an adapter."""

    @model_validator(mode="after")
    def _adapter_with_adamw(self) -> Self:
        if self.lora is not None and self.optimizer.kind != "adamw":
            raise ValueError(f'optimizer.kind: expected "adamw" for an adapter, got {self.optimizer.kind!r}')
        return self

    def tables(self) -> tuple[list[PreferenceTable], list[PreferenceTable]]:
        """The tables to learn from, and the held-out ones."""
        return self.data, self.validation

    def prepare(self, context: Context) -> None:
        """Pack the pairs, and compute their log-probabilities under the reference."""
        base = context.open(self.model)
        self.pack(context, base)

        import torch

        from llm.data.packing import has_reference
        from llm.device import main_device, resolve_precision
        from llm.models.checkpoint import load_checkpoint
        from llm.training.dpo import write_reference

        folders = [context.scratch / name for name in (ROWS, VALIDATION_ROWS)]
        missing = [folder for folder in folders if folder.exists() and not has_reference(folder)]
        if not missing:
            return
        device = main_device()
        torch.set_num_threads(context.cores)
        model = load_checkpoint(base.folder, device=device)
        precision = resolve_precision(context.parallel.precision, device=device)
        for folder in missing:
            write_reference(folder, model, precision=precision, report=context.report, should_stop=context.should_stop)

    def run(self, context: Context) -> Metrics:
        """Train, and write the checkpoint."""
        import torch

        from llm.adapters import lora
        from llm.adapters.merge import merge_attached
        from llm.models.checkpoint import load_checkpoint, save_checkpoint
        from llm.training.dpo import PreferenceLoss

        base = context.open(self.model)
        model = load_checkpoint(base.folder, dtype=torch.float32 if self.lora is None else None)
        if self.lora is not None:
            lora.attach(model, self.lora.adapter, seed=self.seed)
        objective = PreferenceLoss(beta=self.beta, label_smoothing=self.label_smoothing)
        metrics = self.learn_rows(context, model, objective=objective, watched=objective.watched)
        if is_main_process():
            if self.lora is not None:  # into the exact weights, which a frozen base does not hold
                adapted, model = model, load_checkpoint(base.folder)
                lora.copy_adapter(adapted, model)
                merge_attached(model)
            dtype = resolve_dtype(self.dtype, base.folder)
            save_checkpoint(context.work, model, base.tokenizer.folder, dtype=dtype)
        return metrics

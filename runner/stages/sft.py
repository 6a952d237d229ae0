"""The kind `sft`: supervised fine-tuning of all weights of a checkpoint."""

from pydantic import Field

from runner.artifacts import Checkpoint
from runner.stage import Context, Metrics, Ref, Semantic
from runner.stages.fields.chat_training import RowTraining
from runner.stages.fields.stored_dtype import StoredDtype, resolve_dtype
from runner.stages.fields.training import is_main_process


class FineTune(RowTraining, kind="sft", version=5, makes=Checkpoint):
    """Fine-tunes all weights of a model on prompts and responses, or on chats of many turns."""

    model: Semantic[Ref[Checkpoint]]
    """The model to fine-tune."""
    dropout: Semantic[float] = Field(0.0, ge=0, lt=1)
    """Share of channels that are zeroed on the embeddings and on each residual branch while training."""

    dtype: Semantic[StoredDtype] = "base"
    """Precision in which the weights are stored; "base" is that of `model`. They are trained in fp32."""

    def prepare(self, context: Context) -> None:
        """Pack the rows, and those mixed into them."""
        self.prepare_rows(context, context.open(self.model))

    def run(self, context: Context) -> Metrics:
        """Train, and write the checkpoint."""
        from llm.models.checkpoint import load_checkpoint, save_checkpoint

        base = context.open(self.model)
        model = load_checkpoint(base.folder, dropout=self.dropout)
        metrics = self.learn_mixed(context, model, base)
        if is_main_process():
            dtype = resolve_dtype(self.dtype, base.folder)
            save_checkpoint(context.work, model, base.tokenizer.folder, dtype=dtype)
        return metrics

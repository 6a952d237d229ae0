"""What the kinds share that train a model from nothing on packed text: its tokens and its architecture."""

from typing import TYPE_CHECKING, Any

from llm.models import architecture_tables, architectures
from runner.artifacts import Tokens
from runner.stage import Context, Ref, Semantic, Stage
from runner.stages.pack import Pack
from runner.stages.training import TrainingStage, is_main_process

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from llm.models.llama.config import LlamaConfig as ArchitectureConfig
else:
    ArchitectureConfig = architecture_tables()


class Pretraining(TrainingStage):
    """A training from nothing, or from where another one was left."""

    tokens: Semantic[Ref[Tokens]]
    """The text to learn, as tokens; its tokenizer goes into the checkpoint."""
    architecture: Semantic[ArchitectureConfig]
    """The model: `name` says which of the registered architectures, the rest is its sizes."""

    def steps(self, stages: "Mapping[str, Stage]") -> int | None:
        """How many it takes; None where that is only known once its tokens are there."""
        if self.budget.steps is not None or self.budget.epochs is not None:
            return self.budget.steps
        pack = stages.get(self.tokens)
        rows = self.batch_tokens // pack.context if isinstance(pack, Pack) else 0
        if not isinstance(pack, Pack) or not rows:
            return None
        return self.budget.in_steps(batch_tokens=rows * pack.context, rows_per_step=rows, rows_per_epoch=rows)

    def learn_text(self, context: Context, *, beginning: "Path | None", goes_on: bool = False) -> dict[str, Any]:
        """Draw the weights, train from there or from `beginning`, and write the checkpoint; returns the metrics."""
        import torch

        from llm.checkpoint import save_checkpoint
        from llm.errors import InputError
        from llm.tokenizer import TextTokenizer
        from llm.tokens import TokenRows, TokenShards
        from llm.validation import Validation

        tokens = context.open(self.tokens)
        held_out = TokenShards(tokens.validation)
        rows = TokenRows(tokens.train, context=held_out.context, seed=self.seed)
        config = self.architecture
        if config.context is None:
            config = config.model_copy(update={"context": rows.context})
        elif config.context < rows.context:
            raise InputError(
                f"architecture.context wants at least the {rows.context} tokens of a row of {str(self.tokens)!r}; "
                f"found {config.context}"
            )
        torch.manual_seed(self.seed)
        vocab_size = TextTokenizer.load(tokens.tokenizer.folder).vocab_size
        model = architectures()[config.name].build(config, vocab_size=vocab_size)
        validation = None
        if held_out.tokens:
            validation = Validation(
                TokenRows(tokens.validation, context=rows.context, seed=None),
                bytes_per_token=held_out.bytes / held_out.tokens,
                tokens=self.validation_tokens,
            )
        metrics = self.learn(
            context, model, rows=rows, validation=validation, check=True, beginning=beginning, goes_on=goes_on
        )
        if is_main_process():
            save_checkpoint(context.work, model, tokens.tokenizer.folder)
        return metrics

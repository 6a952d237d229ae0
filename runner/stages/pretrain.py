"""The kind `pretrain`: a model with fresh weights learns to predict the next token of packed text."""

from typing import TYPE_CHECKING

from llm.models import architecture_tables, architectures
from runner.artifacts import Checkpoint, Tokens
from runner.stage import Context, Metrics, Ref, Semantic
from runner.stages.training import TrainingStage, is_main_process

if TYPE_CHECKING:
    from llm.models.llama.config import LlamaConfig as ArchitectureConfig
else:
    ArchitectureConfig = architecture_tables()


class Pretrain(TrainingStage, kind="pretrain", version=1, makes=Checkpoint):
    """Trains a model from nothing on packed text."""

    tokens: Semantic[Ref[Tokens]]
    """The text to learn, as tokens; its tokenizer goes into the checkpoint."""
    architecture: Semantic[ArchitectureConfig]
    """The model: `name` says which of the registered architectures, the rest is its sizes."""

    def run(self, context: Context) -> Metrics:
        """Draw the weights, train, and write the checkpoint."""
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
        metrics = self.learn(context, model, rows=rows, validation=validation, check=True)
        if is_main_process():
            save_checkpoint(context.work, model, tokens.tokenizer.folder)
        return metrics

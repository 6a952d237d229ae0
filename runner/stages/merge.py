"""The kind `merge`: a checkpoint and its adapters become one checkpoint that computes the same."""

from typing import Annotated

from pydantic import Field

from runner.artifacts import Adapter, Checkpoint
from runner.stage import Context, Metrics, Ref, Semantic, Stage


class Merge(Stage, kind="merge", version=1, makes=Checkpoint):
    """Merges adapters into the full-precision weights of their base, in fp32."""

    base: Semantic[Ref[Checkpoint]]
    """The model that the first adapter was trained on."""
    adapters: Semantic[Annotated[list[Ref[Adapter]], Field(min_length=1)]]
    """One adapter, or several that are merged one after the other, each on the result of those before it."""

    def run(self, context: Context) -> Metrics:
        """Merge, and write the checkpoint."""
        from llm.checkpoint import load_checkpoint, save_checkpoint
        from llm.errors import InputError
        from llm.merge import merge_adapters

        base = context.open(self.base)
        adapters = [context.open(adapter) for adapter in self.adapters]
        wanted = context.records[self.base]["digest"]
        first = context.records[self.adapters[0]]
        if wanted not in [source["digest"] for source in first["inputs"].values()]:
            raise InputError(
                f"adapters[0]: wants an adapter trained on {str(self.base)!r}, but {str(self.adapters[0])!r} was trained on "
                f"{', '.join(first['inputs'])}"
            )
        model = load_checkpoint(base.folder)
        merge_adapters(model, [adapter.folder for adapter in adapters])
        save_checkpoint(context.work, model, base.tokenizer.folder)
        return {"adapters": len(adapters)}

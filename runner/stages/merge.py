"""The kind `merge`: a checkpoint and its adapters as one checkpoint that computes the same.

adapters = ["medical"]                                  # one, or a chain: each was trained on the merge of those before it
adapters = ["medical", "legal"], weights = [0.7, 0.3]   # a mix: all were trained on `base`
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from runner.artifacts import Adapter, Checkpoint
from runner.stage import Context, Metrics, Ref, Semantic, Stage
from runner.stages.fields.stored_dtype import StoredDtype, resolve_dtype


class Merge(Stage, kind="merge", version=1, makes=Checkpoint):
    """Merges adapters into the full-precision weights of their base, in fp32."""

    imports = ("llm.adapters.merge", "peft")

    base: Semantic[Ref[Checkpoint]]
    """The model that the first adapter was trained on; with `weights`, that all were trained on."""
    adapters: Semantic[Annotated[list[Ref[Adapter]], Field(min_length=1)]]
    """One adapter, or several that are merged in order, each trained on the result of those before it."""
    weights: Semantic[list[float] | None] = None
    """One number per adapter: all are applied to the base at once, and its weights change by the weighted sum of the changes
    by each."""

    dtype: Semantic[StoredDtype] = "base"
    """Precision in which the weights are stored; "base" is that of `base`. They are merged in fp32."""

    @model_validator(mode="after")
    def _a_weight_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(
                f"weights: expected one number for each of {len(self.adapters)} adapters, got {len(self.weights)}"
            )
        if twice := [str(name) for name in self.adapters if self.adapters.count(name) > 1]:
            raise ValueError(f"adapters: expected each adapter once, got {twice[0]!r} twice")
        return self

    def run(self, context: Context) -> Metrics:
        """Merge, and write the checkpoint."""
        from llm.adapters.merge import MergedWeights
        from llm.device import return_freed_blocks
        from llm.models.checkpoint import save_checkpoint

        base = context.open(self.base)
        folders = [context.open(adapter).folder for adapter in self.adapters]
        self._check_origins(context)
        return_freed_blocks()
        merged = MergedWeights(base.folder, folders, self.weights)
        dtype = resolve_dtype(self.dtype, base.folder)
        save_checkpoint(context.work, merged.model, base.tokenizer.folder, dtype=dtype, read=merged)
        metrics = {name: context.records[name].get("metrics", {}) for name in self.adapters}
        losses = {name: found["merge_losses"] for name, found in metrics.items() if found.get("merge_losses")}
        return {"adapters": len(folders)} | ({"losses": losses} if losses else {})

    def _check_origins(self, context: Context) -> None:
        """InputError if an adapter was trained on another model than the one that it is merged into."""
        from llm.errors import InputError

        base = context.records[self.base]["digest"]
        for place, name in enumerate(self.adapters):
            sources = context.input_digests(name)
            if self.weights is not None or place == 0:
                if base not in sources:
                    found = ", ".join(context.records[name]["inputs"])
                    raise InputError(
                        f"adapters[{place}]: expected an adapter trained on {str(self.base)!r}, but {str(name)!r} was trained "
                        f"on {found}"
                    )
                continue
            before = self.adapters[place - 1]
            wanted = context.records[before]["digest"]
            if not any(
                record["digest"] in sources and wanted in context.input_digests(other)
                for other, record in context.records.items()
            ):
                hint = "; weights = [...] mixes adapters of one base" if base in sources else ""
                raise InputError(
                    f"adapters[{place}]: expected an adapter trained on a merge of {str(before)!r}, but {str(name)!r} was "
                    f"trained on {', '.join(context.records[name]['inputs'])}{hint}"
                )

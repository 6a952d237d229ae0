"""The fields of an adapter, which `lora` has on the stage and `dpo` in a table."""

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from runner.stage import Semantic, Spec

if TYPE_CHECKING:
    from llm.adapters import lora


class AdapterFields(Spec):
    """A low-rank adapter (Hu et al. 2021), and modules that are trained in full with it."""

    r: Semantic[Annotated[int, Field(gt=0)]] = 8
    """Rank of the update of each matrix."""
    alpha: Semantic[Annotated[int, Field(gt=0)]] = 16
    """The update is scaled by alpha / r."""
    dropout: Semantic[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Share of the adapter's input channels that are zeroed while training."""
    target_modules: Semantic[Annotated[list[str], Field(min_length=1)] | Literal["all-linear"]] = "all-linear"
    """Names of the layers that get an adapter, or ends of names, as ["q_proj", "layers.0.mlp.up_proj"]; "lm_head" only if the
    base is not tied. "all-linear" is all linear layers but the head."""
    modules_to_save: Semantic[list[str]] = Field(default_factory=list)
    """Names of modules that are trained in full and saved with the adapter, or ends of names, as ["embed_tokens", "norm"]. The
    embedding of a tied base is also its head."""
    rslora: Semantic[bool] = False
    """Scale the update by alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    dora: Semantic[bool] = False
    """Learn the length and the direction of each row of the matrices separately (Liu et al. 2024)."""
    bias: Semantic[Literal["none"]] = "none"
    """Biases to train; only "none": those of a base stay as they are."""

    @field_validator("target_modules")
    @classmethod
    def _head_without_dropout(cls, targets: list[str] | str, info: ValidationInfo) -> list[str] | str:
        if "lm_head" in targets and info.data.get("dropout"):  # llm checks it too, but only after the base is trained
            raise ValueError('expected dropout = 0 with "lm_head", or other layers, since its adapter has no dropout')
        return targets

    @property
    def adapter(self) -> "lora.LoraConfig":
        """The fields as `llm.adapters.lora` has them; imports torch."""
        from llm.adapters import lora

        return lora.LoraConfig(**{field.name: getattr(self, field.name) for field in fields(lora.LoraConfig)})

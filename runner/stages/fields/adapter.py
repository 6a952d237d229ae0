"""What a recipe says of an adapter: the fields that `lora` has on the stage and `dpo` in a table of its own."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from runner.stage import Semantic, Spec

if TYPE_CHECKING:
    from llm.adapters import lora


class AdapterFields(Spec):
    """A low-rank adapter (Hu et al. 2021), and what is trained in full beside it."""

    r: Semantic[Annotated[int, Field(gt=0)]] = 8
    """Rank of the update of each matrix."""
    alpha: Semantic[Annotated[int, Field(gt=0)]] = 16
    """The update counts alpha / r."""
    dropout: Semantic[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Share of the channels that the adapter does not see while training."""
    target_modules: Semantic[Annotated[list[str], Field(min_length=1)] | Literal["all-linear"]] = "all-linear"
    """Names of the layers that get an adapter, or ends of names, as ["q_proj", "layers.0.mlp.up_proj"]. "lm_head" is one where
    the base is not tied; "all-linear" is all but the head."""
    modules_to_save: Semantic[list[str]] = Field(default_factory=list)
    """Names of modules that are trained in full beside the adapter, or ends of names, as ["embed_tokens", "norm"]; they are
    saved with it. The embedding of a tied base is its head as well."""
    rslora: Semantic[bool] = False
    """The update counts alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    dora: Semantic[bool] = False
    """Learn length and direction of each row of the matrices apart (Liu et al. 2024)."""
    bias: Semantic[Literal["none", "lora_only", "all"]] = "none"
    """Which biases learn; the layers of a Llama have none, so it is "none"."""

    @field_validator("target_modules")
    @classmethod
    def _head_without_dropout(cls, targets: list[str] | str, info: ValidationInfo) -> list[str] | str:
        if "lm_head" in targets and info.data.get("dropout"):  # said here too, before a base is trained for it
            raise ValueError('names "lm_head", whose adapter has no dropout; expected dropout = 0 beside it, or other layers')
        return targets

    @field_validator("bias")
    @classmethod
    def _there_is_none(cls, bias: str) -> str:
        if bias != "none":
            raise ValueError(f'expected "none", got {bias!r}: no layer of a Llama has a bias, so nothing would learn')
        return bias

    @property
    def adapter(self) -> "lora.LoraConfig":
        """The same for `llm.adapters.lora`; imports torch."""
        from llm.adapters import lora

        return lora.LoraConfig(
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            rslora=self.rslora,
            dora=self.dora,
            modules_to_save=self.modules_to_save,
        )

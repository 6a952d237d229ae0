"""The registry of architectures: every folder in here is one.

A folder holds four modules. `config.py` imports no torch, because it is read in planning: `Config`, the architecture's
`ModelConfig`, whose `name` is the name recipes use; `MODEL_TYPE`, the `model_type` of Transformers that computes the same;
`to_transformers` and `from_transformers` between `Config` and the fields of a `config.json`; `parameter_count` and
`flops_per_token`. `model.py` has the modules, under Transformers' names, and `build`, which makes a `LanguageModel`;
`decode.py` has `build`, which makes its `Decoding`; `gguf.py` tells llama.cpp how to compute the same. Adding a folder adds an
architecture; nothing else lists them. `llm.models.interface` has the types.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BaseModel, Discriminator, Tag

if TYPE_CHECKING:
    from llm.models.interface import LanguageModel, ModelConfig


@dataclass(frozen=True)
class Architecture:
    """One entry of the registry. `build` imports torch; the rest does not."""

    name: str
    config: type[BaseModel]
    model_type: str

    def build(self, config: "ModelConfig", *, vocab_size: int) -> "LanguageModel":
        """The model with freshly drawn weights, from torch's default generator."""
        model: Any = importlib.import_module(f"llm.models.{self.name}.model")
        built: LanguageModel = model.build(config, vocab_size=vocab_size)
        return built

    def to_transformers(self, config: "ModelConfig") -> dict[str, Any]:
        """The fields of a `config.json` that describe the same model as `config`."""
        fields: dict[str, Any] = self._config_module().to_transformers(config)
        return fields

    def from_transformers(self, found: Mapping[str, Any], *, dropout: float) -> "ModelConfig":
        """The configuration in the fields of a `config.json`; InputError names a field that is not supported."""
        config: ModelConfig = self._config_module().from_transformers(found, dropout=dropout)
        return config

    def parameter_count(self, config: "ModelConfig", *, vocab_size: int) -> int:
        """How many weights a model of this shape has."""
        count: int = self._config_module().parameter_count(config, vocab_size=vocab_size)
        return count

    def flops_per_token(self, config: "ModelConfig", *, vocab_size: int, context: int) -> float:
        """Floating-point operations of a forward and backward pass per position: an estimate."""
        flops: float = self._config_module().flops_per_token(config, vocab_size=vocab_size, context=context)
        return flops

    def gguf(self) -> Any:
        """The module that writes it for llama.cpp: ARCHITECTURE, `write_sizes` and `tensors`."""
        return importlib.import_module(f"llm.models.{self.name}.gguf")

    def _config_module(self) -> Any:
        return importlib.import_module(f"llm.models.{self.name}.config")


@cache
def architectures() -> Mapping[str, Architecture]:
    """Every architecture by name."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.ispkg:
            config: Any = importlib.import_module(f"llm.models.{module.name}.config")
            found[module.name] = Architecture(module.name, config.Config, config.MODEL_TYPE)
    return found


def architecture_tables() -> Any:
    """The type of a recipe's field for any architecture's table, discriminated by its `name`, "llama" by default."""
    configs = {name: architecture.config for name, architecture in architectures().items()}
    if len(configs) == 1:  # pydantic has no union of one
        return next(iter(configs.values()))

    def name_of(table: Any) -> Any:
        return table.get("name", "llama") if isinstance(table, dict) else getattr(table, "name", None)

    tagged = tuple(Annotated[config, Tag(name)] for name, config in configs.items())
    return Annotated[Union[tagged], Discriminator(name_of)]  # noqa: UP007  # the members are known only now

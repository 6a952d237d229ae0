"""The registry of architectures: every family in `llm.models.families` is one, and one decoder computes them all.

`decoder/config.py` imports no torch, because it is read in planning. `decoder/model.py` has the modules, under Transformers'
names; `decoder/decode.py` decodes; `decoder/gguf.py` tells llama.cpp how to compute the same. `llm.models.interface` has the
types by which all others know a model.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llm.errors import InputError
from llm.models.decoder.config import DecoderConfig, flops_per_token, parameter_count
from llm.models.families import families, family_of
from llm.models.families.config_json import refused

if TYPE_CHECKING:
    from llm.models.interface import LanguageModel, ModelConfig


@dataclass(frozen=True)
class Architecture:
    """One entry of the registry. `build` imports torch; the rest does not."""

    name: str

    @property
    def model_type(self) -> str:
        """The `model_type` of Transformers that computes the same."""
        return self.name

    def config(self, fields: Mapping[str, Any]) -> DecoderConfig:
        """The configuration with these fields of a recipe's table."""
        return DecoderConfig.model_validate({"name": self.name, **fields})

    def build(self, config: "ModelConfig", *, vocab_size: int) -> "LanguageModel":
        """The model with freshly drawn weights, from torch's default generator."""
        model: Any = importlib.import_module("llm.models.decoder.model")
        built: LanguageModel = model.build(config, vocab_size=vocab_size)
        return built

    def to_transformers(self, config: "ModelConfig") -> dict[str, Any]:
        """The fields of a `config.json` that describe the same model as `config`."""
        return families()[self.name].to_transformers(_decoder(config))

    def parameter_count(self, config: "ModelConfig", *, vocab_size: int) -> int:
        """How many weights a model of this shape has."""
        return parameter_count(_decoder(config), vocab_size=vocab_size)

    def flops_per_token(self, config: "ModelConfig", *, vocab_size: int, context: int) -> float:
        """Floating-point operations of a forward and backward pass per position: an estimate."""
        return flops_per_token(_decoder(config), vocab_size=vocab_size, context=context)

    def gguf(self) -> Any:
        """The module that writes it for llama.cpp: `write_sizes` and `tensors`."""
        return importlib.import_module("llm.models.decoder.gguf")


def _decoder(config: "ModelConfig") -> DecoderConfig:
    assert isinstance(config, DecoderConfig)  # there is no other
    return config


@cache
def architectures() -> Mapping[str, Architecture]:
    """Every architecture by name."""
    return {name: Architecture(name) for name in families()}


def architecture_tables() -> Any:
    """The type of a recipe's field for any architecture's table."""
    return DecoderConfig


def from_transformers(found: Mapping[str, Any], *, dropout: float) -> DecoderConfig:
    """The configuration in the fields of a `config.json`; InputError names a field that is not supported."""
    model_type = found.get("model_type")
    if (known := family_of(model_type)) is None:
        raise refused("model_type", " or ".join(map(repr, families())), model_type)
    family, alias = known
    fields = {alias.renamed.get(field, field): value for field, value in found.items()}
    fields = {
        **alias.missing,
        **{field: value for field, value in fields.items() if value is not None or field not in alias.missing},
    }
    try:
        return DecoderConfig.model_validate({"name": family.name, "dropout": dropout, **family.fields_of(fields)})
    except InputError:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "value_error":
            raise InputError(str(first["ctx"]["error"])) from error
        message = first["msg"].replace("Input should be", "expected")
        raise InputError(f"{place}: {message}, got {first['input']!r:.80}" if place else message) from error
    except (TypeError, AttributeError, ValueError, ArithmeticError, LookupError) as error:  # values of other types
        raise InputError(f"expected the values that Transformers writes, got others: {error}") from error

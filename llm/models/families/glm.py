"""GLM-4-9B (GLM team 2024): as GLM-4 of 2025, with norms only of what a branch reads."""

from typing import TYPE_CHECKING, Any

from llm.errors import InputError
from llm.models.families.family import NORMS
from llm.models.families.glm4 import Glm4
from llm.models.options import Options

if TYPE_CHECKING:
    from gguf import GGUFWriter


class Glm(Glm4):
    """GLM-4-9B, as Transformers has it ("THUDM/glm-4-9b-chat-hf")."""

    name = "glm"
    transformers_class = "GlmForCausalLM"
    own = Glm4.own.model_copy(update={"norms": "before"})
    gguf_architecture = "chatglm"

    def norms_of(self, options: Options) -> tuple[str | None, ...]:  # noqa: D102
        return NORMS[options.norms]

    def write_gguf(self, writer: "GGUFWriter", config: Any) -> None:  # noqa: D102
        if (size := config.hidden_size // config.heads) != config.head_size:
            raise InputError(f"head_size: expected {size}, as llama.cpp has it in a {self.name}, got {config.head_size}")

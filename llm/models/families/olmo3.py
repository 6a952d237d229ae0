"""OLMo 3 (Ai2 2025): OLMo 2 with windows on three of four layers, whose rotary embedding is not scaled."""

from llm.models.families.olmo2 import Olmo2
from llm.models.families.windowed import Windowed


class Olmo3(Windowed):
    """OLMo 3."""

    name = "olmo3"
    transformers_class = "Olmo3ForCausalLM"
    every = 4
    own = Olmo2.own.model_copy(
        update={"pattern": ("window", "window", "window", "full"), "window": 4096, "window_rope_base": 5e5}
    )
    defaults = Olmo2.defaults
    missing = Olmo2.missing
    free = Windowed.free | {"window_rope_base"}
    gguf_architecture = "olmo2"
    gguf_marker = "attention.sliding_window"
    gguf_ties = False

"""Gemma 3, its text models (Kamath et al. 2025): Gemma 2 with norms on heads in place of caps, and windows on five of six
layers, whose rotary embedding has a base of its own.
"""

from llm.models.families.gemma2 import CAPS, Gemma2
from llm.models.families.windowed import Windowed


class Gemma3Text(Gemma2):
    """Gemma 3 270M and 1B, and the text models inside larger ones."""

    name = "gemma3_text"
    transformers_class = "Gemma3ForCausalLM"
    every = 6
    own = Gemma2.own.model_copy(
        update={
            "qk_norm": "head",
            "pattern": (*["window"] * 5, "full"),
            "window": 512,  # of the smallest
            "window_rope_base": 1e4,
            "attention_softcap": 0.0,
            "final_softcap": 0.0,
        }
    )
    defaults = {"rope_base": 1e6}
    missing = {**Gemma2.missing, "max_position_embeddings": 131072}
    free = Windowed.free | {"window_rope_base", "attention_scale"}
    fixed = {"use_bidirectional_attention": False}
    unset = ("quantization_config", "auto_map", *CAPS.values())
    gguf_architecture = "gemma3"
    gguf_options = Windowed.gguf_options

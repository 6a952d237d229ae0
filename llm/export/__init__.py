"""In how many bits a GGUF file holds weights, by name. No torch here: recipes are checked without it."""

from typing import Literal

GgufPrecision = Literal["f32", "f16", "bf16", "q8_0"]

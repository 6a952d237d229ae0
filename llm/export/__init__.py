"""Export of a model: GGUF files, Ollama's Modelfile, and parity checks of the model in other systems.

The precisions of GGUF files are named here, where recipes can be validated without torch.
"""

from typing import Literal

GgufPrecision = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

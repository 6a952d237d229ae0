"""Export of a model: GGUF files, Ollama's Modelfile, and parity checks of the model in other systems.

The precisions of GGUF files are named here, where recipes can be validated without torch.
"""

from typing import Literal

GgufPrecision = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
KQuant = Literal["q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k"]  # by llama.cpp's own tools

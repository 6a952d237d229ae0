"""Adapters merged into the weights they adapt: the result is an ordinary model that computes what base and adapter did."""

from collections.abc import Sequence
from pathlib import Path

from llm.lora import adapted_layers, load_adapter
from llm.models.llama.model import Llama


def merge_adapters(model: Llama, folders: Sequence[Path]) -> None:
    """Merge the adapters of `folders` into `model`, one after the other, each on the result of those before it.

    The model holds full-precision weights (fp32): merging into quantized ones would round the adapter away.
    """
    for folder in folders:
        load_adapter(model, folder)
        for name, layer in list(adapted_layers(model)):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
        del model.peft_config

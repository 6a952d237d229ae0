"""Adapters merged into the weights they adapt: the result is an ordinary model that computes what base and adapter do."""

from collections.abc import Sequence
from pathlib import Path

import torch

from llm.adapters.lora import adapted_layers, load_adapter
from llm.models.interface import LanguageModel


def merge_adapters(model: LanguageModel, folders: Sequence[Path]) -> None:
    """Merge the adapters of `folders` into `model`, one after the other.

    The model holds full-precision weights (fp32): merging into quantized ones would round the adapter away.
    """
    for folder in folders:
        load_adapter(model, folder)
        merge_attached(model)


def merge_attached(model: LanguageModel) -> None:
    """Merge the adapter that `model` has; modules trained in full already hold their weights."""
    for name, layer in list(adapted_layers(model)):
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


@torch.no_grad()
def mix_adapters(model: LanguageModel, folders: Sequence[Path], weights: Sequence[float]) -> None:
    """Add to `model` the weighted sum of the changes that the adapters of `folders`, all trained on it, make to it."""
    base = {name: weight.clone() for name, weight in model.named_parameters()}
    totals: dict[str, torch.Tensor] = {}
    for folder, share in zip(folders, weights, strict=True):
        merge_adapters(model, [folder])
        for name, weight in model.named_parameters():
            if not torch.equal(weight, base[name]):
                totals[name] = totals.get(name, 0) + share * (weight - base[name])
                weight.copy_(base[name])
    for name, total in totals.items():
        model.get_parameter(name).add_(total)

"""Adapters merged into the weights they adapt: the result is an ordinary model that computes what base and adapter do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.adapters.frozen import freeze
from llm.adapters.lora import adapted_layers, load_adapter, load_low_rank, uses_dora
from llm.models.checkpoint import load_checkpoint
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


class MergedWeights:
    """The weights of a base with adapters, each computed in fp32 when it is asked for: no more than one is in memory.

    The adapters follow each other, or, with `shares`, all change the base at once by their share.
    """

    def __init__(self, base: Path, adapters: Sequence[Path], shares: Sequence[float] | None = None) -> None:
        self.model = load_checkpoint(base, dtype=None)  # pages of its file
        self._plain = dict(self.model.named_parameters())
        self._shares = shares
        self._adapted = [_Adapted(base, folder) for folder in adapters]

    @torch.no_grad()
    def __call__(self, name: str) -> Tensor:
        """The weight of this name; as it is stored where no adapter changes it."""
        stored = self._plain[name].detach()
        if not any(one.changes(name) for one in self._adapted):
            return stored
        weight = stored.to(torch.float32, copy=True)
        if self._shares is None:
            for one in self._adapted:
                weight = one.merged(name, weight)
            return weight
        changed = [(share, one) for share, one in zip(self._shares, self._adapted, strict=True) if one.changes(name)]
        total = sum(share * (one.merged(name, weight.clone()) - weight) for share, one in changed)
        return weight.add_(total)


class _Adapted:
    """One adapter in a copy of its base, which holds nothing but the adapter's own weights."""

    def __init__(self, base: Path, folder: Path) -> None:
        # DoRA's lengths of rows are those of the exact weights.
        model = load_checkpoint(base, dtype=torch.float32 if uses_dora(folder) else None)
        freeze(model)
        self._full = load_low_rank(model, folder)
        self._layers: dict[str, Any] = {f"{name}.weight": layer for name, layer in adapted_layers(model)}
        for layer in self._layers.values():
            layer.get_base_layer().weight.data = torch.empty(0)

    def changes(self, name: str) -> bool:
        """Whether it changes the weight of this name."""
        return name in self._full or name in self._layers

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight with the adapter in it."""
        if name in self._full:
            return self._full[name].float()
        layer = self._layers.get(name)
        if layer is None:
            return weight
        base = layer.get_base_layer()
        base.weight.data = weight
        layer.merge(safe_merge=True)
        layer.merged_adapters.clear()  # so that it can be asked again
        found: Tensor = base.weight.data
        base.weight.data = torch.empty(0)
        return found

"""A matrix and its low-rank update in one operation: what PEFT's own layer computes, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.adapters.lora_linear import can_fuse, fuse


def layers(*, bias: bool = False) -> tuple[Any, Any]:
    """The same layer of PEFT twice; the second computes as we do."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    found = []
    for _ in range(2):
        torch.manual_seed(0)
        base = nn.Linear(24, 40, bias=bias).requires_grad_(False)
        config = LoraConfig(r=4, lora_alpha=12, init_lora_weights=False)
        found.append(Linear(base, "default", config, r=4, lora_alpha=12))
    fuse(found[1], adapter="default")
    return found[0], found[1]


def learn(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """The output, and every gradient."""
    x = x.clone().requires_grad_()
    out = layer(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert layer.base_layer.weight.grad is None
    found = {name: weight.grad for name, weight in layer.named_parameters() if weight.requires_grad}
    assert set(found) == {"lora_A.default.weight", "lora_B.default.weight"}
    return found | {"out": out.detach(), "x": x.grad}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_it_gives_the_output_and_gradients_of_pefts_layer(bf16: bool, bias: bool) -> None:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        theirs, ours = (learn(layer, x) for layer in layers(bias=bias))
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape, name
        allowed = (0.02 if bf16 else 1e-6) * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, atol=allowed, rtol=0, msg=name)


def test_it_learns_where_its_input_needs_no_gradient() -> None:
    _, layer = layers()
    layer(torch.ones(2, 24)).sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().max() > 0


def test_a_disabled_or_merged_adapter_is_not_added_again() -> None:
    _, layer = layers()
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        adapted, plain = layer(x), layer.base_layer(x)
        layer.enable_adapters(False)
        torch.testing.assert_close(layer(x), plain)
        layer.enable_adapters(True)
        layer.merge()
        torch.testing.assert_close(layer(x), adapted)
    assert (adapted - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (nn.Embedding(2, 2), {}),
        (nn.Linear(2, 2, bias=False), {"dropout": 0.1}),
        (nn.Linear(2, 2, bias=False), {"dora": True}),
    ],
)
def test_other_adapters_are_left_to_peft(base: nn.Module, settings: dict[str, Any]) -> None:
    assert not can_fuse(base, **({"dropout": 0.0, "dora": False} | settings))
    assert can_fuse(nn.Linear(2, 2, bias=False), dropout=0.0, dora=False)

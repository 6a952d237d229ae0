"""What does not learn is held once: the bytes that are in memory, and that results are those of autocast's copies."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import MadeUpRows, tiny_model, tiny_training
from torch import Tensor, nn

from llm.adapters import lora
from llm.adapters.frozen import FrozenLinear, hold_once
from llm.data.batch import Batch, collate
from llm.layers.dropout import set_counters
from llm.models.checkpoint import save_checkpoint
from llm.models.interface import LanguageModel
from llm.tokenizer.train_bpe import train_bpe
from llm.training.config import Budget
from llm.training.loss import Learner, next_token_loss

KINDS: list[dict[str, Any]] = [
    {},
    {"dropout": 0.1},
    {"dora": True},
    {"target_modules": ["q_proj", "down_proj"]},
    {"modules_to_save": ["embed_tokens", "norm"]},
    {"modules_to_save": ["up_proj"], "target_modules": ["v_proj"]},
]


def adapted(dtype: torch.dtype = torch.float32, *, tied: bool = True, **kind: Any) -> LanguageModel:
    """A model with weights of `dtype` and an adapter that changes it."""
    model = tiny_model(hidden_size=48, tied=tied).to(dtype)
    lora.attach(model, lora.LoraConfig(**{"r": 4, "alpha": 8, **kind}), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)
    return model


def some_batch() -> Batch:
    return collate([MadeUpRows().row(index) for index in range(4)], range(4))


def learned(model: LanguageModel, precision: Any) -> dict[str, Tensor]:
    """The loss of a batch, and the gradient of all that learns."""
    learner, batch = Learner(model, next_token_loss, precision=precision).train(), some_batch()
    set_counters(model, seed=0, step=0, rows=batch.rows)
    model.zero_grad()
    total, _ = learner(batch)
    total.backward()
    return {"loss": total.detach()} | {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_held_in_bf16_give_the_bits_that_autocast_gives(kind: dict[str, Any], tied: bool) -> None:
    model = adapted(tied=tied, **kind)
    wanted = learned(model, "bf16")
    hold_once(model, "bf16")
    equal(learned(model, "bf16"), wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_of_16_bits_trains_as_the_same_base_in_fp32(kind: dict[str, Any], precision: Any, tmp_path: Path) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        rounded = tiny_model(hidden_size=48, tied=False).to(torch.bfloat16).to(dtype)
        lora.attach(rounded, lora.LoraConfig(**{"r": 4, "alpha": 8, **kind}), seed=1)
        tiny_training(rounded, tmp_path / str(dtype), precision=precision, budget=Budget(steps=3))
        found.append({name: weight for name, weight in rounded.named_parameters() if weight.requires_grad})
        assert all(weight.dtype == torch.float32 for weight in found[-1].values())  # masters
    equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"dropout": 0.1}])
def test_a_base_trained_in_bf16_takes_two_bytes_a_weight_and_no_copy(
    kind: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(dtype, tied=False, **kind)
    tiny_training(model, tmp_path, precision="bf16", budget=Budget(steps=2))
    matrices = [module.weight for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(matrices) == 2 * 7 + 1
    assert all(weight.untyped_storage().nbytes() == 2 * weight.numel() for weight in matrices)
    assert copies(model, "bf16") == []


@pytest.mark.parametrize("kind", [{}, {"dropout": 0.1}])
def test_a_base_of_16_bits_is_not_copied_by_products_in_fp32(kind: dict[str, Any]) -> None:
    model = adapted(torch.bfloat16, **kind)
    assert copies(model, "fp32") == []
    assert model.embedding.weight is model.lm_head.weight and model.embedding.weight.dtype == torch.bfloat16


def copies(model: LanguageModel, precision: Any) -> list[tuple[int, ...]]:
    """The shapes of what the forward pass keeps that is as large as a frozen matrix, and is not it."""
    mine = {weight.untyped_storage()._cdata for weight in model.parameters()}
    shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, FrozenLinear)}
    shapes |= {shape[::-1] for shape in shapes}
    found: list[tuple[int, ...]] = []

    def look(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) in shapes and tensor.untyped_storage()._cdata not in mine:
            found.append(tuple(tensor.shape))
        return tensor

    batch = some_batch()
    set_counters(model, seed=0, step=0, rows=batch.rows)
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        _total, _ = Learner(model, next_token_loss, precision=precision).train()(batch)
    return found


def test_an_adapter_is_drawn_in_fp32_beside_a_base_of_16_bits() -> None:
    one, other = (dict(adapted(dtype).named_parameters()) for dtype in (torch.float32, torch.bfloat16))
    for name, weight in one.items():
        if "lora_" in name:
            assert torch.equal(weight, other[name]) and other[name].dtype == torch.float32


def test_a_frozen_layer_equals_a_linear_layer_in_value_and_gradient() -> None:
    plain = nn.Linear(24, 40, bias=False).requires_grad_(False)
    frozen = FrozenLinear(24, 40, bias=False)
    frozen.weight = plain.weight
    found = []
    for layer in (frozen, plain):
        x = torch.linspace(-1, 1, 3 * 5 * 24).view(3, 5, 24).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        found.append({"out": out, "x": x.grad})
    equal(*found)


LAYER_BY_LAYER = """
import sys
from pathlib import Path

import bitsandbytes, torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm.adapters import lora
from llm.models.checkpoint import load_checkpoint

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

class Watch(TorchDispatchMode):
    most = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        Watch.most = max(Watch.most, held())
        return result

lora.quantize(load_checkpoint(Path(sys.argv[2])), double=True)  # what is loaded once does not count
before = held()
with Watch():
    model = load_checkpoint(Path(sys.argv[1]), dtype=None)
    lora.quantize(model, double=True)
print((Watch.most - before) * 1024, sum(1 for _ in model.parameters()))
"""


def test_a_base_is_quantized_layer_by_layer_while_it_is_loaded(tmp_path: Path) -> None:
    """Of a model of 16 bits no copy is ever in memory as a whole: its weights are pages of the file until they are
    quantized."""
    train_bpe(["heart"], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True).save(tmp_path / "tokenizer")
    sizes = {"hidden_size": 128, "layers": 96, "heads": 4}
    numbers = {}
    for name, changes in (("large", sizes), ("small", {})):
        model = tiny_model(**changes)
        save_checkpoint(tmp_path / name, model, tmp_path / "tokenizer", dtype=torch.bfloat16)
        numbers[name] = sum(weight.numel() for weight in model.parameters())
    done = subprocess.run(
        [sys.executable, "-c", LAYER_BY_LAYER, str(tmp_path / "large"), str(tmp_path / "small")],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # so that what is freed is given back, and does not count
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    most = int(done.stdout.split()[0])
    # Bytes, of which 2 would be the whole; bitsandbytes takes 200 for each weight of the layer that it quantizes.
    assert most / numbers["large"] < 1.8

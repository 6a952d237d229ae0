"""Bytes that a training holds for each weight of its base, in weights, gradients and optimizer: measured, and counted.

    python -m llm.bench.costs.weight_memory

A base of 135M weights in bf16, as a checkpoint holds it, is opened and trained for a step on one short row, in a process of
its own; the peak of its resident memory counts, less what the process held after imports. For a base that is too large to
hold, the same functions build the training on the meta device, where tensors have sizes and no content; bytes of a layer in
four bits are those of one that is really quantized.
"""

import gc
import importlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from llm.adapters import lora
from llm.adapters.frozen import hold_once
from llm.bench.costs.lora import weight_bytes
from llm.bench.costs.memory import _peak, _start
from llm.bench.implementations import ADAPTER, FULL, QLORA, WAYS, CountingRows, StockpotTraining
from llm.bench.workload import Workload
from llm.models import architectures
from llm.models.interface import LanguageModel, count_parameters, dtype_of
from llm.training.distributed.process_group import ProcessGroup

SMALL = {"hidden_size": 576, "layers": 30, "heads": 9, "kv_heads": 3, "intermediate_size": 1536, "context": 128}
LARGE = {"hidden_size": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate_size": 14336, "context": 128}
BASES: dict[str, tuple[dict[str, Any], int]] = {  # sizes, and tokens in the vocabulary
    "135M": (SMALL, 49_152),
    "8B": (LARGE | {"tied": False}, 128_256),
}
PROCESSES = 8  # of the training whose weights are sharded
LEARNED = 4 + 8  # bytes of an fp32 gradient and of AdamW's two moments


def main() -> None:
    """Print both tables, or measure what the command line asks for."""
    if len(sys.argv) > 1:
        way, folder = sys.argv[1:]
        print(json.dumps(_measured_here(way, Path(folder))))
        return
    print(f"{'base':6}{'training':12}{'held, counted':>16}{'peak, measured':>16}   bytes for each weight of the base")
    for name in BASES:
        for way in (*WAYS, "fsdp"):
            held, weights = _counted(name, way)
            peak = "" if name != "135M" or way == "fsdp" else f"{_measured(way) / weights:.2f}"
            shown = f"fsdp, {PROCESSES}" if way == "fsdp" else way
            print(f"{name:6}{shown:12}{held / weights:16.2f}{peak:>16}   {held / 2**30:.2f} GiB", flush=True)


def _counted(name: str, way: str) -> tuple[float, int]:
    """Bytes that one process holds, and weights of the base."""
    sizes, vocab_size = BASES[name]
    with torch.device("meta"):
        model = _build(sizes, vocab_size)
        weights = count_parameters(model)[1]
        packed = _packed_layer(sizes) if way == QLORA else 0.0
        if way in (FULL, "fsdp"):
            model.float()  # what learns, learns in fp32
        else:
            lora.attach(model, ADAPTER, seed=0)
            hold_once(model, "bf16")
    held = 0.0
    for weight in model.parameters():
        held += weight.numel() * (weight.element_size() + (LEARNED if weight.requires_grad else 0))
    if way == QLORA:
        frozen = [weight for weight in model.layers.parameters() if weight.dim() == 2 and not weight.requires_grad]
        held += packed * sizes["layers"] - sum(weight.numel() * weight.element_size() for weight in frozen)
    if way == "fsdp":
        layer = sum(weight.numel() for weight in model.layers[0].parameters())
        rest = weights - layer * sizes["layers"]  # embedding and head
        held = held / PROCESSES + 2 * (layer + rest)  # gathered in bf16
    return held, weights


def _packed_layer(sizes: dict[str, Any]) -> float:
    """Bytes of the linear layers of one decoder layer in four bits, really quantized."""
    with torch.device("cpu"):
        model = _build(sizes | {"layers": 1}, 64)
        before = weight_bytes(model) - sum(_bytes(module) for module in _linear(model))
        lora.quantize(model, double=True)
        return weight_bytes(model) - before


def _linear(model: LanguageModel) -> list[nn.Linear]:
    return [module for module in model.layers.modules() if isinstance(module, nn.Linear)]


def _bytes(module: nn.Linear) -> int:
    return module.weight.numel() * module.weight.element_size()


def _build(sizes: dict[str, Any], vocab_size: int) -> LanguageModel:
    architecture = architectures()["llama"]
    built = architecture.build(architecture.config(sizes), vocab_size=vocab_size)
    return built.to(dtype_of("bf16"))


def _measured(way: str) -> int:
    """Peak bytes of a training of the small base."""
    sizes, vocab_size = BASES["135M"]
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as folder:
        model = _build(sizes, vocab_size)
        state = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
        save_file(state, Path(folder, "base.safetensors"))
        del model, state
        gc.collect()
        command = [sys.executable, "-P", "-m", "llm.bench.costs.weight_memory", way, folder]
        return int(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def _measured_here(way: str, folder: Path) -> int:
    from safetensors.torch import load_file

    for package in ("peft", "bitsandbytes") if way != FULL else ():
        importlib.import_module(package)
    sizes, vocab_size = BASES["135M"]
    workload = Workload.model_validate(
        {"architecture": sizes, "vocab_size": vocab_size, "context": 32, "rows": 1, "micro_batch": 1}
        | {"compiled": False, "fused_attention": False, "cores": torch.get_num_threads()}
    )
    before = _start()
    with torch.device("meta"):
        model = _build(sizes, vocab_size)
    weights = load_file(folder / "base.safetensors")
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    model.lm_head.weight = model.embedding.weight
    if way == QLORA:
        lora.quantize(model, double=True)
    if way == FULL:
        model.float()
    else:
        lora.attach(model, ADAPTER, seed=0)
    del weights
    training = StockpotTraining(workload, model, group=ProcessGroup(), rows=CountingRows(32, vocab_size))
    for _ in range(2):
        training.step()
    assert math.isfinite(training.loss(training.prepared[0][0][0]))
    return _peak() - before


if __name__ == "__main__":
    main()

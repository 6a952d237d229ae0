"""LoRA and QLoRA compared with training all weights: share of the weights that learns, time of a step, peak memory.

All three take turns on the same model and step, in one process; each has a process of its own for its peak memory. The memory
of a base is that of its weights alone, with the scales that belong to them, in four bits and in bf16.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from llm.adapters import lora
from llm.bench.costs import memory
from llm.bench.implementations import ADAPTER, FULL, QLORA, WAYS, build_stockpot_model, build_stockpot_training
from llm.bench.timing import interleaved, ratio
from llm.bench.workload import Workload
from llm.models.interface import count_parameters
from llm.training.distributed.process_group import ProcessGroup


def measure_lora(workload: Workload, *, seconds: float, group: ProcessGroup) -> dict[str, Any]:
    """The figures of each of WAYS (QLoRA where bitsandbytes is installed), and the memory of the base."""
    names = [way for way in WAYS if way != QLORA or find_spec("bitsandbytes")]
    trainings = {name: build_stockpot_training(workload, name, group=group) for name in names}
    timings = interleaved({name: one.step for name, one in trainings.items()}, seconds=seconds, device=group.device)
    peaks = {name: memory.peak_in_process(name, workload)[0] for name in names}
    ways: dict[str, Any] = {}
    for name, one in trainings.items():
        learned, parameters = count_parameters(one.model)
        ways[name] = {
            "trained_parameters": learned,
            "trained_share": learned / parameters,
            "seconds_per_step": timings[name].median,
            "rounds": timings[name].rounds,
            "time_of_full": ratio(timings, name, FULL),
            "peak_memory_bytes": peaks[name],
            "memory_of_full": peaks[name] / peaks[FULL],
        }
    found: dict[str, Any] = {"r": ADAPTER.r, "ways": ways}
    if QLORA in names:
        base = build_stockpot_model(workload).to(group.device)
        bf16 = 2 * count_parameters(base)[1]
        lora.quantize(base, double=True)
        held = weight_bytes(base)
        found["base"] = {"nf4_bytes": held, "bf16_bytes": bf16, "nf4_of_bf16": held / bf16}
    return found


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights; those in four bits with their scales and lookup table."""
    tensors: list[torch.Tensor] = []
    for weight in model.parameters():
        tensors.append(weight.detach())
        state = getattr(weight, "quant_state", None)
        while state is not None:
            tensors += [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
            state = state.state2
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

"""Peak memory of a training step, ours and stock Transformers' in fp32 eager: each in a process of its own.

On CPU: the peak of resident memory over three steps, less what the process held after imports, before the model was built.
So weights, gradients, optimizer, activations and the buffers of libraries count; the code of torch does not. On a GPU: the
peak of what torch's allocator handed out.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it when they are made, and imports are not measured

from llm.bench.implementations import (
    LORA,
    QLORA,
    CountingRows,
    StockpotTraining,
    TransformersTraining,
    build_learning_model,
    build_stockpot_model,
    build_stockpot_training,
)
from llm.bench.peft_training import PeftTraining, stock_steps
from llm.bench.workload import Workload
from llm.device import has_compiler, peak_memory, resolve_precision
from llm.models import architectures
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loader import batches

ADAPTED, STOCK_ADAPTER = "adapted", "peft-"  # candidates of `llm.bench.peft_step`
STEPS = 3
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)  # positions of a row
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"  # see proc_pid_clear_refs(5)


def measure_memory(workload: Workload) -> dict[str, Any]:
    """Bytes of both, and our share of Transformers'."""
    ours, micro_batch = peak_in_process("ours", workload)
    theirs, _ = peak_in_process("transformers_fp32", workload.model_copy(update={"micro_batch": micro_batch}))
    return {
        "ours": ours,
        "transformers_fp32": theirs,
        "share": ours / theirs,
        "micro_batch": micro_batch,  # rows of a forward pass, of both
        "what": "bytes allocated on the GPU" if torch.cuda.is_available() else "resident bytes above those after imports",
    }


def measure_contexts(workload: Workload, contexts: Sequence[int] = CONTEXTS) -> dict[int, int]:
    """Peak bytes of our step on one row of each length, uncompiled: the dry run before it, and one step."""
    found = {}
    for context in contexts:
        sizes = {"context": context, "rows": 1, "micro_batch": 1, "compiled": False}
        found[context], _ = peak_in_process("ours", workload.model_copy(update=sizes), steps=1)
    return found


def peak_in_process(name: str, workload: Workload, *, steps: int = STEPS) -> tuple[int, int]:
    """Peak bytes of steps, and rows of a forward pass, of "ours", "transformers_fp32", one of the ways of
    `llm.bench.costs.lora`, or one of the candidates of `llm.bench.peft_step`."""
    environment = dict(os.environ)
    if name == "transformers_fp32" or name.startswith(
        STOCK_ADAPTER
    ):  # a plain program does not have the settings of the allocator that a run has
        environment = {key: value for key, value in environment.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "llm.bench.costs.memory", name, str(steps)],
        input=workload.model_dump_json(),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peak, micro_batch = json.loads(done.stdout)
    return peak, micro_batch


def main() -> None:
    """Take the steps of the training named on the command line: workload on standard input, result on standard output."""
    name, steps = sys.argv[1], int(sys.argv[2])
    workload = Workload.model_validate_json(sys.stdin.read())
    if name.startswith(STOCK_ADAPTER):
        found = _stock_adapter(workload, int(name.removeprefix(STOCK_ADAPTER)), steps)
    else:
        found = _theirs(workload, steps) if name == "transformers_fp32" else _ours(workload, name, steps)
    print(json.dumps(found))


def _ours(workload: Workload, name: str, steps: int) -> tuple[int, int]:
    group = ProcessGroup()
    if name == "ours" and workload.compiled is not False and has_compiler(group.device.type):
        torch.compile(torch.relu)(torch.ones(8, device=group.device))  # the compiler's imports do not count either
    for package in ("peft", "bitsandbytes") if name in (LORA, QLORA, ADAPTED) else ():
        importlib.import_module(package)
    before = _start()
    if name == "ours":
        training = StockpotTraining(workload, build_stockpot_model(workload), group=group)
    elif name == ADAPTED:
        training = StockpotTraining(workload, build_learning_model(workload), group=group)
    else:
        training = build_stockpot_training(workload, name, group=group)
    for _ in range(steps):
        training.step()
    return _peak() - before, training.loop.runtime.micro_batch


def _theirs(workload: Workload, steps: int) -> tuple[int, int]:
    micro_batch = int(workload.micro_batch)  # that of ours
    model_type = architectures()[workload.architecture.name].model_type
    importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")  # imports are not measured
    group = ProcessGroup()
    torch.set_num_threads(workload.cores)
    before = _start()
    rows = CountingRows(workload.context, workload.vocab_size)
    parts = [batch.to(group.device) for batch in batches(rows, range(workload.rows), micro_batch)]
    training = TransformersTraining(workload, None, steps=[parts], device=group.device)
    for _ in range(steps):
        training.step("fp32")
    return _peak() - before, micro_batch


def _stock_adapter(workload: Workload, micro_batch: int, steps: int) -> tuple[int, int]:
    model_type = architectures()[workload.architecture.name].model_type
    for name in ("peft", f"transformers.models.{model_type}.modeling_{model_type}"):
        importlib.import_module(name)
    group = ProcessGroup()
    torch.set_num_threads(workload.cores)
    precision = resolve_precision(workload.precision, device=group.device)
    before = _start()
    parts = stock_steps(workload, micro_batch, device=group.device)
    training = PeftTraining(workload, steps=parts, precision=precision, device=group.device)
    for _ in range(steps):
        training.step()
    return _peak() - before, micro_batch


def _start() -> int:
    """Bytes in use now; the peak is reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # without permission, the peak of imports counts, too
        CLEAR.write_text(CLEAR_PEAK)
    return _resident("VmRSS") if STATUS.exists() else _peak()


def _peak() -> int:
    if torch.cuda.is_available():
        return peak_memory("cuda")
    # On Linux not `peak_memory`: getrusage includes the process that started this one.
    return _resident("VmHWM") if STATUS.exists() else peak_memory("cpu")


def _resident(field: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.removesuffix("kB")) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    main()

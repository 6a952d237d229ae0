"""A training of seconds on made-up rows: run by tests in their own process, or in several."""

import ctypes
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm.bench.implementations import StockpotTraining
from llm.bench.workload import Workload
from llm.data.batch import IGNORE, Batch, PackedRow, collate
from llm.data.packing import PackedRows, StreamWriter
from llm.files import write_tensors
from llm.models.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.train_bpe import train_bpe
from llm.training.alerts.config import Alerts
from llm.training.config import Budget, Optimizer, Schedule
from llm.training.distributed.fsdp import shard
from llm.training.distributed.process_group import ProcessGroup
from llm.training.dpo import PreferenceLoss, write_reference
from llm.training.loss import Learner, next_token_loss
from llm.training.task import CHECKPOINTS, CheckpointConfig, ComputeConfig, TrainingTask
from llm.training.trainer import train
from llm.training.validation import Validation

VOCABULARY = 40
ROWS = 5  # of a step
POISONED = 25  # the step that learns from rows whose loss counts a thousandfold
POSITIONS = 24  # of an answer with its prompt


@dataclass(frozen=True)
class MadeUpRows:
    """Counting modulo a number, in documents of changing length, with a changing share of targets."""

    context: int = 24
    rows_per_epoch: int = 64
    seed: int = 0
    bytes_per_token: float | None = None
    is_weighted: bool = False  # the documents of each row count in the loss 0.02 to 0.3 times

    def row(self, index: int) -> PackedRow:
        random = np.random.default_rng([self.seed, index])
        border = int(random.integers(4, self.context - 4))
        documents = (np.arange(self.context) >= border).astype(np.int32)
        stride = random.integers(1, 4, size=2)[documents]
        tokens = (np.arange(self.context) * stride + random.integers(VOCABULARY)) % VOCABULARY
        targets = np.append(tokens[1:], IGNORE)
        targets[border - 1] = IGNORE
        targets[: int(random.integers(self.context - 3))] = IGNORE  # as in a chat: the prompt is not learned
        row = PackedRow(tokens.astype(np.int64), targets.astype(np.int64), documents)
        if self.is_weighted:
            weights = random.uniform(0.02, 0.3, size=2)[documents] * (targets != IGNORE)
            return replace(row, weights=weights.astype(np.float32))
        if self.bytes_per_token is None:
            return row
        text_bytes = np.full(self.context, self.bytes_per_token, dtype=np.float32)
        return replace(row, sources=documents, text_bytes=text_bytes)  # as held-out rows have them


@dataclass(frozen=True)
class PoisonedRows(MadeUpRows):
    """Rows of which those of some steps are marked by a first token that no other row has."""

    steps: tuple[int, ...] = (POISONED,)
    rows_per_epoch: int = 1000

    def row(self, index: int) -> PackedRow:
        row = super().row(index)
        marked = index // ROWS in self.steps
        tokens = np.where(np.arange(self.context) == 0, 39 if marked else 0, row.tokens)
        return PackedRow(tokens, row.targets, row.documents)


def tiny_model(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 24}
    return Decoder(DecoderConfig.model_validate(sizes | changes), vocab_size=VOCABULARY)


def tiny_training(
    model: Decoder, scratch: Path, *, lines: list[dict[str, Any]] | None = None, **changes: Any
) -> dict[str, Any]:
    """Train `model`; what is reported goes to `lines`.

    `changes` are fields of TrainingTask, ComputeConfig and CheckpointConfig, `validate_every`, and other arguments of `train`.
    """
    reported: list[dict[str, Any]] = [] if lines is None else lines
    task: dict[str, Any] = {
        "objective": next_token_loss,
        "rows": MadeUpRows(),
        "budget": Budget(steps=20),
        "batch_tokens": 5 * 24,
        "schedule": Schedule(learning_rate=1e-2, warmup_steps=3),
        "optimizer": Optimizer(),
        "seed": 7,
        "alerts": Alerts(),
    }
    compute = {"cores": 1, "precision": "fp32", "compiled": False, "fused_attention": False, "timeout_minutes": 1.0}
    arguments: dict[str, Any] = {
        "validation": Validation(MadeUpRows(rows_per_epoch=6, seed=9, bytes_per_token=3.0), sources=("first", "second")),
        "report": lambda **values: reported.append(values),
        "should_stop": lambda: False,
    }
    every = changes.pop("validate_every", 8)
    arguments |= {
        name: changes.pop(name) for name in ("validation", "report", "should_stop", "check", "row_log") if name in changes
    }
    if arguments["validation"] is not None:
        arguments["validation"] = replace(arguments["validation"], every=every)
    return train(
        model,
        TrainingTask(**task | _fields_of(TrainingTask, changes)),
        compute=ComputeConfig(**compute | _fields_of(ComputeConfig, changes)),
        checkpoints=CheckpointConfig(scratch, **_fields_of(CheckpointConfig, changes)),
        **arguments | changes,
    )


def _fields_of(config: type, changes: dict[str, Any]) -> dict[str, Any]:
    """The fields of `config`, taken out of `changes`."""
    return {field.name: changes.pop(field.name) for field in fields(config) if field.name in changes}


def poisoned(times: float) -> Callable[[Any, Batch], tuple[Tensor, Tensor]]:
    """The loss of the next token, times `times` for marked rows."""

    def objective(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        total, count, *_ = next_token_loss(model, batch)
        return total * (times if bool((batch.tokens[:, 0] == 39).all()) else 1.0), count

    return objective


def spare_weight(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, to which a weight adds something only in the first row of a step."""
    total, count, *_ = next_token_loss(model, batch)
    return total + model.spare.square().sum() if 0 in batch.rows else total, count


def killed(scratch: Path) -> Any:
    """The loss, until there is a checkpoint: then the second process is killed, as by a power cut."""

    def objective(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        if os.environ.get("RANK") == "1" and list((scratch / CHECKPOINTS).glob("step-*[0-9]")):
            os.kill(os.getpid(), signal.SIGKILL)
        return next_token_loss(model, batch)

    return objective


def run_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train as `case` says; metrics, what was reported, and a digest of the weights."""
    lines: list[dict[str, Any]] = []
    scratch = folder / case.get("scratch", "unnamed")
    model = tiny_model(dropout=case.get("dropout", 0.1), **case.get("model", {}))
    changes: dict[str, Any] = {"micro_batch": 1, "budget": Budget(steps=case["steps"])}
    changes |= {name: case[name] for name in ("strategy", "find_unused_parameters", "every", "precision") if name in case}
    changes["optimizer"] = Optimizer.model_validate({"kind": case.get("optimizer", "adamw")})
    changes |= {name: folder / case[name] for name in ("start_from", "leave_in") if name in case}
    if "schedule" in case:
        changes["schedule"] = Schedule.model_validate(case["schedule"])
    if case.get("weighted"):
        changes["rows"] = MadeUpRows(is_weighted=True)
    if case.get("adapter"):
        from llm.adapters import lora

        lora.attach(model, lora.LoraConfig(r=2, alpha=4, dropout=0.1), seed=3)
    if case.get("objective") == "spare":
        model.spare = nn.Parameter(torch.ones(3))
        changes["objective"] = spare_weight
    if "alerts" in case:
        changes |= {"alerts": Alerts.model_validate(case["alerts"]), "rows": PoisonedRows(), "objective": poisoned(1000.0)}
        changes["optimizer"] = Optimizer(gradient_clip=0.0)
    if case.get("objective") == "killed":
        changes["objective"] = killed(scratch)
    metrics = tiny_training(model, scratch, lines=lines, **changes)
    if "leave_in" in case and os.environ.get("RANK", "0") == "0":
        left = {name: weight.detach() for name, weight in model.named_parameters()}
        write_tensors(folder / case["leave_in"] / WEIGHTS, left)
    weights = [weight.detach().view(torch.uint8) for weight in model.parameters()]  # numpy has no bf16
    digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest()
    return {"metrics": metrics, "lines": lines, "digest": digest}


def shares(kind: str) -> dict[str, float]:
    """What this process holds of weights, gradients and optimizer state under "fsdp", as shares of all."""
    sizes = {"architecture": {"hidden_size": 32, "layers": 2, "heads": 4, "context": 24, "tied": False}}
    sizes |= {"vocab_size": VOCABULARY, "context": 24, "rows": 4, "optimizer": {"kind": kind}, "compiled": False, "cores": 1}
    workload = Workload.model_validate(sizes)
    model = tiny_model(tied=False, kv_heads=4)
    training = StockpotTraining(workload, model, group=ProcessGroup(), strategy="fsdp")
    training.step()
    loss, _ = training.loop.wrapped(training.prepared[0][0][0])
    loss.backward()
    weights: list[Any] = [*training.loop.wrapped.parameters()]
    states = [
        value for optimizer in training.loop.optimizers for state in optimizer.state.values() for value in state.values()
    ]
    found = {"weights": weights, "gradients": [weight.grad for weight in weights], "optimizer": states}
    return {name: _held(tensors) / sum(tensor.numel() for tensor in tensors) for name, tensors in found.items()} | {
        "shell": sum(weight.numel() for weight in model.parameters())
    }


def held() -> dict[str, float]:
    """Bytes for each weight of a model that learns in bf16 under "fsdp", of what this process allocates beside its shards of
    the weights: after a forward pass, and the most in the backward passes of a step of three."""
    model = tiny_model(layers=8, hidden_size=256, kv_heads=4, tied=False, context=12)
    numbers = sum(weight.numel() for weight in model.parameters())
    group = ProcessGroup()
    learner = shard(Learner(model, next_token_loss, precision="bf16"), "fsdp", device=group.device, processes=group.size)
    wrapped = group.wrap(learner, "fsdp")
    batch = collate([MadeUpRows(context=12).row(0)], range(1))
    after: list[int] = []
    during: list[int] = []
    for layer in learner.model.layers:
        layer.register_full_backward_hook(lambda *_: during.append(_allocated()))
    for _ in range(2):  # the first step makes what stays
        wrapped.zero_grad()
        after.clear()
        during.clear()
        before = _allocated()
        for index in range(3):
            with group.gradient_sync(wrapped, index == 2):
                loss, _ = wrapped(batch)
                after.append(_allocated())
                loss.backward()
    return {"forward": (after[0] - before) / numbers, "step": (max(during) - before) / numbers}


class _Malloc(ctypes.Structure):  # mallinfo2(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def _allocated() -> int:
    """Bytes that this process has allocated and not freed, by glibc."""
    measure = ctypes.CDLL(None).mallinfo2
    measure.restype = _Malloc
    found = measure()
    return int(found.uordblks + found.hblkhd)


def _held(tensors: list[Tensor]) -> int:
    """How many numbers this process holds in the memory behind `tensors` of fp32."""
    memory = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in map(_here, tensors)}
    return sum(memory.values()) // 4


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def packed_pairs(folder: Path, pairs: int = 24, seed: int = 0) -> Path:
    """Pairs of random tokens with 3 tokens of prompt; chosen answers have even tokens, rejected ones odd."""
    random = np.random.default_rng(seed)
    with StreamWriter(folder) as writer:
        for _ in range(pairs):
            prompt = random.integers(VOCABULARY, size=3).tolist()
            for odd in (0, 1):
                answer = (2 * random.integers(VOCABULARY // 2, size=int(random.integers(2, 8))) + odd).tolist()
                learned = [False] * 3 + [True] * len(answer)
                writer.append(prompt + answer, learned, full_length=3 + len(answer))
            writer.end_group(1)
    writer.pack(row_lengths=[2 * POSITIONS], padding=0)
    return folder


def with_reference(folder: Path, model: Decoder) -> Path:
    write_reference(folder, model, precision="fp32", report=lambda **_: None, should_stop=lambda: False)
    return folder


def tiny_preferences(folder: Path, scratch: Path, **changes: Any) -> tuple[Decoder, dict[str, Any]]:
    """A model that learned pairs, which are written into `folder`, and the metrics of its training."""
    rows = with_reference(packed_pairs(folder), tiny_model())
    model = tiny_model()
    settings = {
        "objective": PreferenceLoss(0.5),
        "rows": PackedRows(rows, seed=3),
        "validation": Validation(PackedRows(rows, seed=None), watched=PreferenceLoss.watched),
        "budget": Budget(steps=8),
        "batch_tokens": 3 * 2 * POSITIONS,
        "micro_batch": 1,
    }
    return model, tiny_training(model, scratch, **settings | changes)


def save_tiny_base(folder: Path) -> None:
    """Write an fp32 model as a checkpoint, with a tokenizer that nothing reads."""
    tokenizer = folder.with_name("tokenizer")
    train_bpe(["heart"], 300, min_frequency=1, pre_tokenizer_name="gpt-2", allow_smaller=True).save(tokenizer)
    save_checkpoint(folder, tiny_model(tied=False), tokenizer)


def shared_pages(base: Path) -> dict[str, int]:
    """After a step of LoRA on the model in `base`: its frozen matrices, how many of them are pages of the file, and the KiB of
    these pages that this process has for itself.
    """
    from llm.adapters import lora
    from llm.adapters.frozen import FrozenLinear

    model = load_checkpoint(base, dtype=None)
    lora.attach(model, lora.LoraConfig(r=2, alpha=4), seed=3)
    shape = {
        "architecture": model.config,
        "vocab_size": model.vocab_size,
        "context": 24,
        "rows": 4,
        "compiled": False,
        "cores": 1,
    }
    StockpotTraining(Workload.model_validate(shape | {"precision": "bf16"}), model, group=ProcessGroup()).step()
    areas, own, inside = [], 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the head of a mapping: its addresses, and at the end its file
            inside = line.endswith(WEIGHTS)
            areas += [range(*(int(end, 16) for end in words[0].split("-")))] if inside else []
        elif inside and words[0] == "Private_Dirty:":
            own += int(words[1])
    frozen = [module.weight.data_ptr() for module in model.modules() if isinstance(module, FrozenLinear)]
    shared = [address for address in frozen if any(address in area for area in areas)]
    return {"matrices": len(frozen), "shared": len(shared), "own": own}


def main() -> None:
    """Train in this group of processes, or in one of as many as the last argument says, case after case; each process writes
    its results into the folder, by rank."""
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    if sys.argv[3:]:
        from forked_group import become_one_of  # beside this script

        become_one_of(int(sys.argv[3]))
    rank = os.environ.get("RANK", "0")
    for name, case in cases.items():
        if case.get("objective") == "preferences":
            _, metrics = tiny_preferences(folder / f"{name}-pairs-{rank}", folder / name, strategy=case["strategy"])
            found: dict[str, Any] = {"metrics": metrics}
        else:
            measured = (
                shared_pages(folder / case["base"])
                if "base" in case
                else held()
                if "held" in case
                else shares(case["shares"])
                if "shares" in case
                else None
            )
            found = measured or run_case(folder, {"scratch": name} | case)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

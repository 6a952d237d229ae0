"""Training checkpoints: what a training needs to go on bit for bit. Not models for use: those are `llm.models.checkpoint`.

`leave` puts beside the weights of a model folder what another training needs to go on from there, and `begin` makes a training
checkpoint of such a folder. What depends on the clock is left out, so equal trainings leave equal bytes.

`checkpoints/step-00000120/` holds `weights.safetensors` (the weights that learn), `optimizer.safetensors` and `state.json`
(the step, counters, resolved choices, and the sha256 of all of it). A folder under its final name is complete; one whose
digests do not match is passed over for the one before it. The last few are kept.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm.files import write_json, write_tensors, write_text
from llm.models.checkpoint import WEIGHTS as MODEL
from llm.training.distributed.fsdp import full_tensor, sharded_like
from llm.training.distributed.process_group import ProcessGroup

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
PARTIAL = ".partial"
BESIDE_MODEL = "training.json"  # in a model folder, the facts
CLOCKED = "throughput"  # the alert that depends on the clock
CHUNK = 2**24  # bytes of a file that go to the other machines at a time


@dataclass(frozen=True)
class TrainingState:
    """A training between two steps."""

    weights: dict[str, Tensor]  # by parameter name
    optimizer: dict[str, Tensor]  # by "parameter/state"
    facts: dict[str, Any]  # JSON; "step" is the number of finished steps


def take(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, facts: dict[str, Any], keep: bool = True
) -> TrainingState:
    """A copy of everything that learning changes, in ordinary memory, so that training can go on while it is written.

    What is spread over processes is gathered: all take part, and who does not `keep` it gets empty tensors.
    """
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
    states = {
        f"{names[weight]}/{key}": _copy(value, keep)
        for optimizer in optimizers
        for weight, state in optimizer.state.items()
        for key, value in state.items()
    }
    return TrainingState({name: _copy(weight, keep) for weight, name in names.items()}, states, facts)


def _copy(tensor: Tensor, keep: bool) -> Tensor:
    found = full_tensor(tensor.detach())
    if not keep:
        return torch.empty(0)
    return found.to("cpu", copy=True).contiguous()


@torch.no_grad()
def restore(state: TrainingState, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put weights and optimizer state back where `take` found them; what the optimizers have learned since is forgotten."""
    for optimizer in optimizers:
        optimizer.state.clear()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in weights.items():
        weight.copy_(sharded_like(state.weights[name], weight))
    owners = {weight: optimizer for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]}
    for key, value in state.optimizer.items():
        name, _, part = key.rpartition("/")
        weight = weights[name]
        owners[weight].state[weight][part] = sharded_like(value, weight)


def write(folder: Path, state: TrainingState, *, kept: int, since: int | None = None) -> Path:
    """Write `state` under `folder`, complete or not at all, and remove all but the last `kept` up to it.

    The last one that is not after the step `since` is kept besides, and the one after it, which will be that in its time.
    """
    final = folder / f"step-{state.facts['step']:08d}"
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_tensors(partial / WEIGHTS, state.weights)
        write_tensors(partial / OPTIMIZER, state.optimizer)
        digests = {name: _digest(partial / name) for name in (WEIGHTS, OPTIMIZER)}
        facts = json.dumps(state.facts, sort_keys=True)
        digests["facts"] = hashlib.sha256(facts.encode()).hexdigest()
        write_text(partial / STATE, json.dumps({"facts": state.facts, "sha256": digests}, sort_keys=True))
        for path in (*partial.iterdir(), partial):
            _fsync(path)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # so that a full disk is no fuller
        raise
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
    partial.rename(final)
    _fsync(folder)
    earlier = [path for path in _finished(folder) if path <= final]  # later ones are damaged: this one is new
    needed = set(earlier[-kept:])
    if since is not None:
        before = max(0, sum(_step(path) <= since for path in earlier) - 1)
        needed |= set(earlier[before : before + 2])
    for old in earlier:
        if old not in needed:
            shutil.rmtree(old)
    return final


def newest(folder: Path, *, until: int | None = None) -> tuple[Path | None, list[Path]]:
    """The last checkpoint under `folder`, after the step `until` none, whose digests match, and the damaged ones after it."""
    damaged: list[Path] = []
    for path in reversed([path for path in _finished(folder) if until is None or _step(path) <= until]):
        if _is_sound(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def read(path: Path) -> TrainingState:
    """The state in a checkpoint that `newest` found sound."""
    facts = json.loads((path / STATE).read_text(encoding="utf-8"))["facts"]
    return TrainingState(load_file(path / WEIGHTS), load_file(path / OPTIMIZER), facts)


def leave(folder: Path, state: TrainingState) -> None:
    """Put all but the weights into `folder`, which holds or will hold them as a model."""
    progress = state.facts["progress"]
    memory = progress["alerts"]
    memory = memory | {
        "raised": [name for name in memory["raised"] if name != CLOCKED],
        "counts": {name: count for name, count in memory["counts"].items() if name != CLOCKED},
    }
    progress = progress | {"seconds": 0.0, "first_step": 0, "first_tokens": 0, "alerts": memory}
    write_tensors(folder / OPTIMIZER, state.optimizer)
    write_json(folder / BESIDE_MODEL, state.facts | {"progress": progress})


def begin(folder: Path, model: Path) -> Path:
    """Write a checkpoint under `folder` from which a training goes on that ended in the model folder `model`."""
    facts = json.loads((model / BESIDE_MODEL).read_text(encoding="utf-8"))
    facts["progress"] |= {"first_step": facts["step"], "first_tokens": facts["progress"]["tokens"]}
    return write(folder, TrainingState(load_file(model / MODEL), load_file(model / OPTIMIZER), facts), kept=1)


def forget_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for path in _finished(folder):
        if _step(path) > step:
            shutil.rmtree(path)


def remove_partial(folder: Path) -> None:
    """Remove what a run that was killed has left of a checkpoint; nobody may be writing one."""
    for partial in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(partial)


class Writer:
    """Writes checkpoints beside the training, one at a time. A fault of writing comes up at the next write or at close.

    The last `kept` stay; if `reach` is a number, so does the last one that is as many steps old.
    """

    def __init__(self, folder: Path, *, kept: int, reach: int | None = None) -> None:
        self.folder, self._kept, self._reach = folder, kept, reach
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def submit(self, state: TrainingState) -> None:
        """Start writing `state`, after the one before it is on disk."""
        self.wait()
        since = None if self._reach is None else max(0, state.facts["step"] - self._reach)
        self._pending = self._pool.submit(write, self.folder, state, kept=self._kept, since=since)

    def wait(self) -> None:
        """Return when everything submitted is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)
        self.wait()


def _finished(folder: Path) -> list[Path]:
    """Checkpoints under their final name, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.name.endswith(PARTIAL))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_sound(path: Path) -> bool:
    try:
        stored = json.loads((path / STATE).read_text(encoding="utf-8"))
        facts = hashlib.sha256(json.dumps(stored["facts"], sort_keys=True).encode()).hexdigest()
        digests = {name: _digest(path / name) for name in (WEIGHTS, OPTIMIZER)} | {"facts": facts}
        return bool(digests == stored["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def carry(path: Path, folder: Path, group: ProcessGroup) -> Path:
    """Where in its own `folder` each process finds the checkpoint that the main one has at `path`.

    Whoever has none with the same digests there gets a copy, once per machine. All processes call this.
    """
    name, state = group.from_main((path.name, (path / STATE).read_bytes() if group.is_main else b""))
    own: Path = folder / name
    if group.least(_has(own, state))[0] == 1:
        return own
    files = group.from_main(sorted(file.name for file in path.iterdir()) if group.is_main else [])
    partial = own.with_name(own.name + PARTIAL)
    writes = not _has(own, state) and os.environ.get("LOCAL_RANK", "0") == "0"
    if writes:
        for old in (partial, own):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
    for file in files:
        _send(path / file, partial / file if writes else None, group)
    if writes:
        partial.rename(own)
    group.sum(0)  # nobody reads before it is written
    return own


def _has(path: Path, state: bytes) -> bool:
    try:
        return (path / STATE).read_bytes() == state
    except OSError:
        return False


def _send(source: Path, target: Path | None, group: ProcessGroup) -> None:
    """Sends a file of the main process to all; who has a `target` writes it."""
    size = group.from_main(source.stat().st_size if group.is_main else 0)
    with contextlib.ExitStack() as files:
        read = files.enter_context(source.open("rb")) if group.is_main else None
        write = files.enter_context(target.open("wb")) if target else None
        for _ in range(0, size, CHUNK):
            chunk: bytes = group.from_main(read.read(CHUNK) if read else b"")
            if write:
                write.write(chunk)

"""Training checkpoints: what a training needs to go on bit for bit. Not models for use: those are `llm.models.checkpoint`.

`checkpoints/step-00000120/` holds `weights.safetensors` (the weights that learn), `optimizer.safetensors` and `state.json`
(the step, counters, the resolved runtime, and the sha256 of all of it). A folder under its final name is complete; one whose
digests do not match is skipped for the one before it. The last few are kept.

`export_state` puts beside the weights of a model folder what another training needs to go on from there, and `import_state`
makes a checkpoint of such a folder. What depends on the clock is left out, so equal trainings write equal bytes.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm.files import TEMPORARY, whole_folder, write_json, write_tensors, write_text
from llm.models.checkpoint import weight_files
from llm.training.distributed.fsdp import full_tensor, sharded_like
from llm.training.distributed.process_group import ProcessGroup

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
BESIDE_MODEL = "training.json"  # in a model folder, the facts
CLOCKED = "throughput"  # the alert that depends on the clock
PLAIN_NAME = re.compile(r"\w[\w.-]*")
CHUNK = 2**24  # bytes of a file that are sent to the other machines at a time


@dataclass(frozen=True)
class TrainingState:
    """A training between two steps."""

    weights: dict[str, Tensor]  # by parameter name
    optimizer: dict[str, Tensor]  # by "parameter/state"
    facts: dict[str, Any]  # JSON; "step" is the number of finished steps


# The state of a training in memory


def take(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, facts: dict[str, Any], keep: bool = True
) -> TrainingState:
    """A copy of everything that learning changes, in main memory, so that training can go on while it is written.

    All processes call this to gather sharded tensors; one that does not `keep` the state gets empty tensors.
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
    """Put weights and optimizer state back as `take` found them; the optimizers forget what they have."""
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


# Checkpoints on disk


class Writer:
    """Writes checkpoints in the background, one at a time. An error is raised at the next write, or at the end.

    The last `kept` stay; if `reach` is a number, so does the last one that is at least that many steps old.
    """

    def __init__(self, folder: Path, *, kept: int, reach: int | None = None) -> None:
        self.folder, self.reach, self._kept = folder, reach, kept
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def submit(self, state: TrainingState) -> None:
        """Start writing `state`, after the one before it is on disk."""
        self.wait()
        since = None if self.reach is None else max(0, state.facts["step"] - self.reach)
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


def write(folder: Path, state: TrainingState, *, kept: int, since: int | None = None) -> Path:
    """Write `state` under `folder`, complete or not at all, and remove all but the last `kept` up to it.

    The last one at step `since` or before is kept as well, and the one after it, which will take its place later.
    """
    final = folder / f"step-{state.facts['step']:08d}"
    with whole_folder(final) as partial:
        write_tensors(partial / WEIGHTS, state.weights)
        write_tensors(partial / OPTIMIZER, state.optimizer)
        stored = {"facts": state.facts, "sha256": _digests(partial, state.facts)}
        write_text(partial / STATE, json.dumps(stored, sort_keys=True))
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)  # an earlier one of the same step
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
    """The last checkpoint under `folder`, at step `until` or before, whose digests match, and the damaged ones after it."""
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


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for path in _finished(folder):
        if _step(path) > step:
            shutil.rmtree(path)


def remove_partial(folder: Path) -> None:
    """Remove incomplete checkpoints of a run that was killed; no process may be writing one."""
    for partial in folder.glob(f"*{TEMPORARY}"):
        shutil.rmtree(partial)


def _finished(folder: Path) -> list[Path]:
    """Checkpoints under their final name, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.name.endswith(TEMPORARY))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_sound(path: Path) -> bool:
    try:
        stored = json.loads((path / STATE).read_text(encoding="utf-8"))
        return bool(stored["sha256"] == _digests(path, stored["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digests(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    """The sha256 of the two files of tensors in `folder`, and of the facts."""
    digests = {"facts": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}
    for name in (WEIGHTS, OPTIMIZER):
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The state in a model folder, for another training


def export_state(folder: Path, state: TrainingState) -> None:
    """Put all but the weights into `folder`, which holds or will hold them as a model."""
    progress = state.facts["progress"]
    alerts = progress["alerts"]
    alerts = alerts | {
        "raised": [name for name in alerts["raised"] if name != CLOCKED],
        "counts": {name: count for name, count in alerts["counts"].items() if name != CLOCKED},
    }
    progress = progress | {"seconds": 0.0, "first_step": 0, "first_tokens": 0, "alerts": alerts}
    write_tensors(folder / OPTIMIZER, state.optimizer)
    write_json(folder / BESIDE_MODEL, state.facts | {"progress": progress})


def import_state(folder: Path, model: Path) -> Path:
    """Write a checkpoint under `folder` from which a training continues the one that ended in the model folder `model`."""
    facts = json.loads((model / BESIDE_MODEL).read_text(encoding="utf-8"))
    facts["progress"] |= {"first_step": facts["step"], "first_tokens": facts["progress"]["tokens"]}
    weights = {name: tensor for path in weight_files(model) for name, tensor in load_file(path).items()}
    return write(folder, TrainingState(weights, load_file(model / OPTIMIZER), facts), kept=1)


# Checkpoints on machines that do not share a disk


def copy_to_machines(path: Path, folder: Path, group: ProcessGroup) -> Path:
    """Where each process finds, in its own `folder`, the checkpoint that the main process has at `path`.

    A machine without one of the same digests gets a copy, written by its first process. All processes call this.
    """
    own = folder / _plain(group.from_main(path.name))
    state = group.bytes_from_main((path / STATE).read_bytes() if group.is_main else b"")
    if group.min(_has(own, state))[0] == 1:
        return own
    files = [_plain(name) for name in group.from_main(sorted(file.name for file in path.iterdir()) if group.is_main else [])]
    writes = not _has(own, state) and os.environ.get("LOCAL_RANK", "0") == "0"
    with whole_folder(own) if writes else contextlib.nullcontext() as partial:
        for file in files:
            _send(path / file, partial / file if partial else None, group)
        if partial:
            shutil.rmtree(own, ignore_errors=True)
    group.wait()  # no process reads it before it is written
    return own


def _plain(name: str) -> str:
    """The name of a file that another machine sent; ValueError if it could lead out of its folder."""
    if PLAIN_NAME.fullmatch(name) is None:
        raise ValueError(f"checkpoint of the main process: expected plain names of files, got {name!r}")
    return name


def _has(path: Path, state: bytes) -> bool:
    try:
        return (path / STATE).read_bytes() == state
    except OSError:
        return False


def _send(source: Path, target: Path | None, group: ProcessGroup) -> None:
    """Send a file of the main process to all; those with a `target` write it."""
    size = group.from_main(source.stat().st_size if group.is_main else 0)
    with contextlib.ExitStack() as files:
        read = files.enter_context(source.open("rb")) if group.is_main else None
        write = files.enter_context(target.open("wb")) if target else None
        for _ in range(0, size, CHUNK):
            chunk = group.bytes_from_main(read.read(CHUNK) if read else b"")
            if write:
                write.write(chunk)

"""What a training leaves (checkpoints, artifact, the rows it saw), read without torch, and whether two left the same.

Files of tensors are compared by the bytes of each tensor, so equal means bit for bit.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.artifacts import SCRATCH
from runner.stage import Stage

CHECKPOINTS = "checkpoints/step-" + "[0-9]" * 8  # in scratch, as llm.training.checkpoint names those that are complete
TIMES = "seconds"  # in the counters of a checkpoint: the one that differs between any two trainings


@dataclass(frozen=True)
class Check:
    """One thing that both trainings left, and whether it is the same."""

    name: str
    what: str  # how much of it there is
    different: list[str]  # names of what differs


@dataclass(frozen=True)
class Remains:
    """The folders in which one training worked."""

    work: Path
    row_logs: Path  # one file per process

    @property
    def scratch(self) -> Path:
        """Where its checkpoints are."""
        return self.work / SCRATCH

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.scratch.glob(CHECKPOINTS))

    def rows(self) -> list["Rows"]:
        """The rows of steps, as each process wrote them, in the order of the steps' ends within each process."""
        return [Rows(**json.loads(line)) for path in sorted(self.row_logs.glob("*.jsonl")) for line in _whole_lines(path)]

    def processes(self) -> set[int]:
        """The ids of the processes that have done a step."""
        return {line.process for line in self.rows()}


@dataclass(frozen=True)
class Rows:
    """What one process learned from in one step; a line of its log."""

    process: int
    step: int  # counted from 0
    rows: Mapping[str, str]  # place in the step -> digest of the content


def compare(whole: Remains, parts: Remains, stage: Stage, *, steps: range) -> list[Check]:
    """Everything that a training of `steps` left, once done in one go and once in parts."""
    return [
        _rows(whole, parts, steps=steps),
        *_states(whole, parts, end=steps.stop),
        _artifacts(whole, parts, stage),
    ]


def _rows(whole: Remains, parts: Remains, *, steps: range) -> Check:
    """Each time that a step was done, also one that a kill undid, it has to have learned from the same rows."""
    wanted = {(line.step, place): digest for line in whole.rows() for place, digest in line.rows.items()}
    different, seen = set(), set()
    for line in parts.rows():
        for place, digest in line.rows.items():
            seen.add((line.step, place))
            if wanted.get((line.step, place)) != digest:
                different.add((line.step, place))
    different |= wanted.keys() - seen
    missing = sorted(set(steps) - {step for step, _ in wanted})
    names = [f"step {step}, row {place}" for step, place in sorted(different)] + [f"step {step}: no rows" for step in missing]
    return Check("rows", f"{len(wanted):,} rows in {len(steps)} steps, {len(set(wanted.values())):,} different ones", names)


def _states(whole: Remains, parts: Remains, *, end: int) -> Iterator[Check]:
    """Weights, optimizer and counters, as the checkpoint after the last step keeps them."""
    one, other = (remains.scratch / "checkpoints" / f"step-{end:08d}" for remains in (whole, parts))
    for file in sorted({path.name for folder in (one, other) for path in folder.glob("*.safetensors")}, reverse=True):
        tensors, others = _Tensors(one / file), _Tensors(other / file)
        size = sum(tensors.sizes.values())
        what = f"{len(tensors.digests):,} tensors, {size:,} bytes"
        yield Check(file.removesuffix(".safetensors"), what, _differing(tensors.digests, others.digests))
    counters, others_counters = (_counters(folder / "state.json") for folder in (one, other))
    yield Check("counters", f"{len(counters)} of them", _differing(counters, others_counters))


def _artifacts(whole: Remains, parts: Remains, stage: Stage) -> Check:
    digests, others = (stage.makes(remains.work).digests() for remains in (whole, parts))
    return Check("artifact", f"{len(digests)} files", _differing(digests, others))


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(
        name for name in one.keys() | other.keys() if name not in one or name not in other or one[name] != other[name]
    )


def _counters(path: Path) -> dict[str, Any]:
    """What a training counts: steps, tokens, losses, the best validation; not how long it took."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
    except FileNotFoundError:
        return {}
    return {name: value for name, value in facts["progress"].items() if name != TIMES}


class _Tensors:
    """A safetensors file: the length of a header, the header as JSON, and the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes() if path.exists() else b"\x02" + bytes(7) + b"{}"
        length = int.from_bytes(self._data[:8], "little")
        header: dict[str, Any] = json.loads(self._data[8 : 8 + length])
        self._tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
        self._start = 8 + length

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {name: facts["data_offsets"][1] - facts["data_offsets"][0] for name, facts in self._tensors.items()}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each tensor: over its type, shape and bytes."""
        found = {}
        for name, facts in self._tensors.items():
            begin, end = (self._start + offset for offset in facts["data_offsets"])
            digest = hashlib.sha256(json.dumps([facts["dtype"], facts["shape"]]).encode())
            digest.update(memoryview(self._data)[begin:end])
            found[name] = digest.hexdigest()
        return found


def _whole_lines(path: Path) -> Iterator[str]:
    """The lines of a log of rows that no kill cut short."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith("{") and line.endswith("}}"):
            yield line

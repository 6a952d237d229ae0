"""Compares two trainings by their outputs: checkpoints, artifact, and the rows of every step. Reads them without torch.

Tensors are compared by their bytes, so equal means bit for bit.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import deserialize

from runner.artifacts import SCRATCH
from runner.stage import Stage

CHECKPOINTS = "checkpoints/step-" + "[0-9]" * 8  # in scratch; llm.training.checkpoint names complete ones like this
SECONDS = "seconds"  # the counter of a checkpoint that differs between any two trainings


@dataclass(frozen=True)
class Check:
    """One kind of output of two trainings, and whether it is equal."""

    name: str
    what: str  # its size
    different: list[str]  # names of the parts that differ


@dataclass(frozen=True)
class TrainingOutput:
    """The folders that one training wrote."""

    work: Path
    row_logs: Path  # one file per process

    @property
    def scratch(self) -> Path:
        """The folder of its checkpoints."""
        return self.work / SCRATCH

    def checkpoints(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.scratch.glob(CHECKPOINTS))

    def steps(self) -> list["StepRows"]:
        """The logged steps of each process, in the order in which the process finished them."""
        return [StepRows(**json.loads(line)) for path in sorted(self.row_logs.glob("*.jsonl")) for line in _whole_lines(path)]

    def processes(self) -> set[int]:
        """The ids of the processes that have finished a step."""
        return {step.process for step in self.steps()}


@dataclass(frozen=True)
class StepRows:
    """The rows that one process learned from in one step; a line of `llm.training.row_log`."""

    process: int
    step: int  # counted from 0
    rows: Mapping[str, str]  # index in the step -> digest of the content


def compare(whole: TrainingOutput, resumed: TrainingOutput, stage: Stage, *, steps: range) -> list[Check]:
    """Compares an uninterrupted training of `steps` with one that was killed and resumed."""
    return [
        _rows(whole, resumed, steps=steps),
        *_states(whole, resumed, end=steps.stop),
        _artifacts(whole, resumed, stage),
    ]


def _rows(whole: TrainingOutput, resumed: TrainingOutput, *, steps: range) -> Check:
    """Every run of a step must have learned from the same rows, also one that a kill undid."""
    expected = {(step.step, index): digest for step in whole.steps() for index, digest in step.rows.items()}
    different, seen = set(), set()
    for step in resumed.steps():
        for index, digest in step.rows.items():
            seen.add((step.step, index))
            if expected.get((step.step, index)) != digest:
                different.add((step.step, index))
    different |= expected.keys() - seen
    missing = sorted(set(steps) - {number for number, _ in expected})
    names = [f"step {number}, row {index}" for number, index in sorted(different)]
    names += [f"step {number}: no rows" for number in missing]
    what = f"{len(expected):,} rows in {len(steps)} steps, {len(set(expected.values())):,} different ones"
    return Check("rows", what, names)


def _states(whole: TrainingOutput, resumed: TrainingOutput, *, end: int) -> Iterator[Check]:
    """Weights, optimizer state and counters in the checkpoint after the last step."""
    one, other = (output.scratch / "checkpoints" / f"step-{end:08d}" for output in (whole, resumed))
    for file in sorted({path.name for folder in (one, other) for path in folder.glob("*.safetensors")}, reverse=True):
        tensors, others = _tensors(one / file), _tensors(other / file)
        size = sum(len(tensor["data"]) for tensor in tensors.values())
        what = f"{len(tensors):,} tensors, {size:,} bytes"
        yield Check(file.removesuffix(".safetensors"), what, _differing(tensors, others))
    counters, others_counters = (_counters(folder / "state.json") for folder in (one, other))
    yield Check("counters", f"{len(counters)} of them", _differing(counters, others_counters))


def _artifacts(whole: TrainingOutput, resumed: TrainingOutput, stage: Stage) -> Check:
    digests, others = (stage.makes(output.work).digests() for output in (whole, resumed))
    return Check("artifact", f"{len(digests)} files", _differing(digests, others))


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(
        name for name in one.keys() | other.keys() if name not in one or name not in other or one[name] != other[name]
    )


def _counters(path: Path) -> dict[str, Any]:
    """The counters of a training: steps, tokens, losses, the best validation; without its time."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
    except FileNotFoundError:
        return {}
    return {name: value for name, value in facts["progress"].items() if name != SECONDS}


def _tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Type, shape and bytes of each tensor in a safetensors file; empty without the file."""
    return dict(deserialize(path.read_bytes())) if path.exists() else {}  # type: ignore[no-untyped-call]


def _whole_lines(path: Path) -> Iterator[str]:
    """The complete lines of a row log; a kill may have cut one short."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith("{") and line.endswith("}}"):
            yield line

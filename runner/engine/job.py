"""The job file that a run writes for the workers of a stage, and the names of the files they exchange in the scratch
folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from runner.files import write_whole

JOB = "job.json"
PREPARED = "prepared"  # exists once `Stage.prepare` is done
RESULT = "result.json"  # metrics, versions and hardware; written last by a worker that succeeded
STOP = "stop"  # its presence asks the workers to checkpoint and end


@dataclass(frozen=True)
class Job:
    """What a worker needs to run its stage."""

    name: str
    kind: str
    fields: Mapping[str, Any]  # of the stage, with absolute paths of input files
    work: str
    inputs: Mapping[str, str]  # stage name -> folder of its artifact
    records: Mapping[str, Mapping[str, Any]]  # stage name -> its record; every ancestor
    recipe: str  # resolved, as TOML
    parallel: Mapping[str, Any]
    processes: int  # of the whole training
    cores: int | None  # for all of them; None counts those of each node where it runs
    data: Mapping[str, Mapping[str, Any]]  # stage name -> field -> its input files; of every ancestor and itself
    nodes: int = 1  # of the training
    settings: Sequence[Sequence[str]] = ()  # of the sweep whose best setting it reads: a header and one row per setting
    beginning: str | None = None  # the folder of an artifact of the same kind to continue from
    row_logs: str | None = None  # a folder in which each process of a training logs the rows it trained on

    def write(self, path: Path) -> None:
        """Saves the job as JSON."""
        write_whole(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The job that `write` saved."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

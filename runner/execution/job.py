"""What the run and the workers of one stage agree on: the job file, and the files that workers leave in the scratch folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from runner.files import write_whole

JOB = "job.json"
PREPARED = "prepared"  # there once the work before a training group is done
RESULT = "result.json"  # metrics, versions and hardware; written last by a worker that succeeded
ERROR = "error.json"  # the sentence of the first process that failed, and whether it may be tried again
STOP = "stop"  # its presence asks the workers to checkpoint and end


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know of its stage."""

    name: str
    kind: str
    fields: Mapping[str, Any]  # of the stage, with absolute paths of input files
    work: str
    inputs: Mapping[str, str]  # stage name -> folder of its artifact
    records: Mapping[str, Mapping[str, Any]]  # stage name -> its record; every ancestor
    recipe: str  # resolved, as TOML
    parallel: Mapping[str, Any]
    processes: int  # of the whole training
    cores: int  # for all of them; of as many machines as train
    data: Mapping[str, Mapping[str, Any]]  # stage name -> field -> its input files; of every ancestor and itself
    settings: Sequence[Sequence[str]] = ()  # of a sweep whose best setting it reads: a head and a row of each
    beginning: str | None = None  # the folder of an artifact of the same kind, to go on from
    row_logs: str | None = None  # a folder in which each process of a training writes which rows it learned from

    def write(self, path: Path) -> None:
        """Saves the job as JSON."""
        write_whole(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The job that `write` saved."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

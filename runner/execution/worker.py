"""One process of a launched stage: reads the job file, runs the stage, and leaves `result.json` or `error.json` in scratch.

It ends at once when its standard input closes: then the run that started it is gone, and an orphan must not write. It also
ends when its job file is gone: then another run took its work over.
"""

import contextlib
import errno
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from llm.errors import InputError, Interrupted, Paused
from runner.artifacts import METRICS, PAUSED, SCRATCH
from runner.execution import liveness
from runner.execution.job import ERROR, RESULT, STOP, Job
from runner.execution.watchdog import Heartbeat
from runner.files import write_whole
from runner.resources import hardware, versions
from runner.stage import Context, Parallel, Stage
from runner.stages import stage_kinds
from runner.tracking.curves import read_curves
from runner.tracking.metrics_file import MetricsWriter

WATCH_SECONDS = 1.0
EXIT_FAILED, EXIT_PAUSED, EXIT_INTERRUPTED, EXIT_ORPHANED = 3, 5, 130, 4
# What machines do to a training, and torch says with a RuntimeError; anything else would only happen again.
MACHINES = (RuntimeError, MemoryError, ConnectionError, TimeoutError)


def main() -> int:
    """Runs the job file named on the command line; `--prepare` runs only what comes before a training group is formed."""
    job_path, *flags = sys.argv[1:]
    job = Job.read(Path(job_path))
    rank = int(os.environ.get("RANK", "0"))
    scratch = Path(job.work) / SCRATCH
    known = liveness.announce(scratch, str(rank))  # noqa: F841  # the lock on it lasts as long as this process
    watch_parent()
    watch_job(Path(job_path))
    try:
        if flags == ["--prepare"]:
            stage, context = _open(job, scratch, rank)
            stage.prepare(context)
            return 0
        _assert_world_size(job.processes)
        stage, context = _open(job, scratch, rank)
        metrics = stage.run(context)
    except Interrupted:
        return EXIT_INTERRUPTED
    except Paused as pause:
        if rank == 0:
            write_whole(scratch / PAUSED, json.dumps({"message": str(pause)}))
        return EXIT_PAUSED
    except (InputError, OSError, MemoryError) as error:
        traceback.print_exc()
        _leave_error(scratch, rank, sentence(error, Path(job.work)), again=isinstance(error, MACHINES))
        return EXIT_FAILED
    except Exception as error:
        traceback.print_exc()
        _leave_error(scratch, rank, f"{type(error).__name__}: {error}", again=isinstance(error, MACHINES))
        return EXIT_FAILED
    if rank == 0:
        result = {"metrics": dict(metrics), "versions": versions(), "hardware": hardware()}
        if stage.trains:
            result["curves"] = read_curves(Path(job.work) / METRICS)
        write_whole(scratch / RESULT, json.dumps(result))
    return 0


def sentence(error: Exception, work: Path) -> str:
    """What a person is told of a fault that is not a bug."""
    match error:
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            return f"{error.strerror} while writing under {work}; free some space and run again, what is finished is kept"
        case OSError(strerror=str(reason), filename=str(name)):
            return f"{reason}: {name}"
        case OSError(strerror=str(reason)):
            return reason
        case MemoryError():
            return "out of memory"
    return str(error)


def watch_parent() -> None:
    """Ends this process when standard input, a pipe from the run that started it, closes."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def watch_job(path: Path) -> None:
    """Ends this process when its job file is moved away."""

    def watch() -> None:
        while _may_exist(path):
            time.sleep(WATCH_SECONDS)
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, daemon=True, name="job-watch").start()


def _may_exist(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a disk of the network may answer again
    return True


def _open(job: Job, scratch: Path, rank: int) -> tuple[Stage, Context]:
    stage = stage_kinds()[job.kind].model_validate(job.fields)
    context = Context(
        name=job.name,
        work=Path(job.work),
        scratch=scratch,
        inputs={name: Path(path) for name, path in job.inputs.items()},
        records=job.records,
        recipe=job.recipe,
        parallel=Parallel.model_validate(job.parallel),
        cores=job.cores,
        report=MetricsWriter(Path(job.work) / METRICS) if rank == 0 else _silent,
        should_stop=Heartbeat(scratch, (scratch / STOP).exists) if rank == 0 else (scratch / STOP).exists,
        data=job.data,
        settings=job.settings,
        beginning=Path(job.beginning) if job.beginning else None,
        row_log=Path(job.row_logs) / f"{rank}.jsonl" if job.row_logs else None,
    )
    return stage, context


def _silent(**values: Any) -> None:
    pass


def _leave_error(scratch: Path, rank: int, message: str, *, again: bool) -> None:
    """The first process that fails says why, and whether trying again may help; the others fail only because it did.

    What is wrong for good is said in any case: another process may have been first to miss this one.
    """
    with contextlib.suppress(OSError):  # a full disk, say: then the log and the exit code are what is left
        if not again or not (scratch / ERROR).exists():
            write_whole(scratch / ERROR, json.dumps({"rank": rank, "message": message, "again": again}))


def _assert_world_size(wanted: int) -> None:
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != wanted:
        raise RuntimeError(f"accelerate launch was asked for {wanted} processes and started {found}")


if __name__ == "__main__":
    sys.exit(main())

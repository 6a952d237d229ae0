"""A worker: one process of a stage. It reads the job file, runs the stage, and writes `result.json` or `error.json` to
scratch.

It exits at once when its standard input closes, since then its run is gone and an orphan must not write, and when its job file
is gone, since then another run took the key over.
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

from llm.errors import InputError, Interrupted, Paused
from runner.artifacts import ERROR, METRICS, PAUSED, SCRATCH
from runner.engine import liveness
from runner.engine.job import RESULT, STOP, Job
from runner.execution.watchdog import Heartbeat
from runner.files import write_whole
from runner.resources import available_cores, hardware, versions
from runner.stage import Context, Parallel, Stage
from runner.stages import stage_kinds
from runner.tracking.curves import read_curves
from runner.tracking.metrics_file import MetricsWriter

WATCH_SECONDS = 1.0
EXIT_FAILED, EXIT_PAUSED, EXIT_INTERRUPTED, EXIT_ORPHANED = 3, 5, 130, 4
# Machine faults, which torch reports as RuntimeError; a retry may help. Other errors would only repeat.
MACHINE_FAULTS = (RuntimeError, MemoryError, ConnectionError, TimeoutError)


def main() -> int:
    """Runs the job file named on the command line; with `--prepare` only `Stage.prepare`, before a training group forms."""
    job_path, *flags = sys.argv[1:]
    job = Job.read(Path(job_path))
    rank = int(os.environ.get("RANK", "0"))
    scratch = Path(job.work) / SCRATCH
    registration = liveness.register(scratch, str(rank))  # noqa: F841  # its lock lasts as long as this process
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
    except Exception as error:
        traceback.print_exc()
        _write_error(scratch, rank, message_of(error, Path(job.work)), again=isinstance(error, MACHINE_FAULTS))
        return EXIT_FAILED
    if rank == 0:
        result = {"metrics": dict(metrics), "versions": versions(), "hardware": hardware()}
        if stage.trains:
            result["curves"] = read_curves(Path(job.work) / METRICS)
        write_whole(scratch / RESULT, json.dumps(result))
    return 0


def message_of(error: Exception, work: Path) -> str:
    """The message of an error, which begins with its class if it is a bug."""
    match error:
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            return f"{error.strerror} while writing under {work}; free some space and run again, finished work is kept"
        case OSError(strerror=str(reason), filename=str(name)):
            return f"{reason}: {name}"
        case OSError(strerror=str(reason)):
            return reason
        case MemoryError():
            return "out of memory"
        case OSError() | InputError():
            return str(error)
    return f"{type(error).__name__}: {error}"


def watch_parent() -> None:
    """Ends this process when standard input, a pipe from its run, closes."""

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
    except OSError as error:
        return not isinstance(error, FileNotFoundError)  # else a temporary fault of a network file system
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
        cores=job.cores or available_cores() * job.nodes,
        report=MetricsWriter(Path(job.work) / METRICS) if rank == 0 else lambda **values: None,
        should_stop=Heartbeat(scratch, (scratch / STOP).exists) if rank == 0 else (scratch / STOP).exists,
        data=job.data,
        settings=job.settings,
        beginning=Path(job.beginning) if job.beginning else None,
        row_log=Path(job.row_logs) / f"{rank}.jsonl" if job.row_logs else None,
    )
    return stage, context


def _write_error(scratch: Path, rank: int, message: str, *, again: bool) -> None:
    """Writes the error of the first process that fails, since the others only fail because of it.

    An error that no retry can fix is always written: another process may have failed first because this one was missing.
    """
    with contextlib.suppress(OSError):  # on a full disk only the log and the exit code are left
        if not again or not (scratch / ERROR).exists():
            write_whole(scratch / ERROR, json.dumps({"rank": rank, "message": message, "again": again}))


def _assert_world_size(expected: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != expected:
        raise RuntimeError(f"accelerate launch: expected {expected} processes, got {started}")


if __name__ == "__main__":
    sys.exit(main())

"""The lock file of a release: the digests, versions and hardware of its stages, and how this machine differs."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from runner.cache.digests import FileContent, Sha256
from runner.errors import RecipeError
from runner.planning.plan import RUNNABLE, Plan
from runner.resources import gpu_count, hardware, version_of, versions


class LockedStage(BaseModel, extra="ignore", frozen=True):
    """A stage as it was run."""

    key: Sha256
    digest: Sha256
    data: Mapping[str, list[FileContent]] = Field(default_factory=dict)  # by field
    versions: Mapping[str, str] = Field(default_factory=dict)
    hardware: Mapping[str, Any] = Field(default_factory=dict)


class Lock(BaseModel, extra="ignore", frozen=True):
    """All stages of a release."""

    stages: Mapping[str, LockedStage]


def read_lock(text: str, place: str) -> Lock:
    """The lock in an untrusted file; RecipeError if it is invalid."""
    try:
        return Lock.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__} at {error.errors()[0]['loc']}" if isinstance(error, ValidationError) else error
        raise RecipeError(f"{place}: expected the lock file of a release, got something else ({reason})") from None


def differences(lock: Lock) -> Iterator[str]:
    """How this machine differs from those of the lock, one line each: versions, then hardware."""
    known = versions()
    for package in dict.fromkeys(name for stage in lock.stages.values() for name in stage.versions):
        there = sorted({stage.versions[package] for stage in lock.stages.values() if package in stage.versions})
        here = known.get(package) or version_of(package)
        if there != [here]:
            yield f"{package}: {', '.join(there)} there, {here or 'none'} here"
    mine = hardware() | {"gpus": gpu_count()}
    theirs = [{**stage.hardware, "gpus": len(stage.hardware.get("gpus", ()))} for stage in lock.stages.values()]
    for what in ("machine", "system", "cores", "gpus"):
        there = sorted({str(hardware[what]) for hardware in theirs if hardware.get(what)})
        if there and there != [str(mine[what])]:
            yield f"{what}: {', '.join(there)} there, {mine[what]} here"


def compared(lock: Lock, plan: Plan) -> dict[str, str]:
    """How each stage of a plan compares to the published one."""
    return {entry.name: _compared(lock.stages.get(entry.name), entry.key, entry.record, entry.state) for entry in plan}


def _compared(locked: LockedStage | None, key: str | None, record: Any, state: str) -> str:
    if locked is None:  # the release itself, or a later stage
        return "reused" if record is not None and state not in RUNNABLE else ""
    if record is not None and state not in RUNNABLE:
        return (
            "reused, as published" if record.digest == locked.digest else "reused; its content differs from the published one"
        )
    if key is not None and key != locked.key:
        return "made here; its fields, inputs or version differ from the published ones"
    return "made here"


def results(lock: Lock, plan: Plan) -> str:
    """A sentence on how many results of a finished plan equal the published ones, by their digests."""
    known = {entry.name: entry.record.digest for entry in plan if entry.record and entry.name in lock.stages}
    other = [name for name, digest in known.items() if digest != lock.stages[name].digest]
    differing = f"; different bytes: {', '.join(other)}" if other else ""
    return f"{len(known) - len(other)} of {len(known)} results equal the published ones{differing}"

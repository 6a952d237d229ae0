"""`run verify`: compares every byte of the artifacts and records of a cache with what was recorded when they were finished.

A damaged artifact is set aside, and the next run makes it again. A damaged record.json is restored from its copy in records/;
a damaged metrics.jsonl, which no stage reads, is set aside alone.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from runner.artifacts import METRICS, RECORD
from runner.cache.integrity import ARTIFACT_NAME, MapDigests, Mismatch, mismatches
from runner.cache.record import DamagedRecordError, Record
from runner.cache.store import NotWritableError, Store
from runner.files import write_whole
from runner.resources import available_cores


@dataclass
class Findings:
    """The result of a verification."""

    artifacts: int = 0
    records: int = 0  # copies in records/
    faults: list[str] = field(default_factory=list)  # one line each, with what was done about it
    origins: Counter[str | None] = field(default_factory=Counter)  # of the records: remotes, or None if made here


def verify(store: Store) -> Findings:
    """Reads the whole cache. Damaged artifacts of a key in use are reported and left in place."""
    findings = Findings()
    folders = sorted(path for path in (store.root / "stages").glob("*") if not path.name.startswith("."))
    cores = available_cores()
    with ThreadPoolExecutor(cores) as artifacts, ThreadPoolExecutor(cores) as files:  # hashing lets other threads run
        for faults in artifacts.map(partial(_verify_artifact, store, digests=files.map), folders):
            findings.artifacts += 1
            findings.faults += faults
    for path in sorted((store.root / "records").glob("*.json")):
        findings.records += 1
        findings.faults += _verify_copy(store, path)
        with contextlib.suppress(OSError, DamagedRecordError):
            findings.origins[store.origins.of(Record.read(path))] += 1
    return findings


def _verify_artifact(store: Store, folder: Path, *, digests: MapDigests) -> list[str]:
    name = ARTIFACT_NAME.fullmatch(folder.name)
    if name is None or not folder.is_dir():
        return [f"stages/{folder.name}: not a folder <kind>-<key>; set aside in {store.move_aside(folder)}"]
    faults = _faults(store, folder, digests=digests)
    if not faults:
        return []
    try:
        with store.lock_if_free(name["kind"], name["key"]) as free:
            faults = _faults(store, folder, digests=digests)  # again: the former holder of the lock may have changed it
            if not faults:
                return []
            done = _repair(store, folder, faults) if free else "in use, so it is left in place: verify again later"
    except NotWritableError:
        done = "left in place, since the cache cannot be written"
    return [f"{fault}; {done}" for fault in faults]


def _faults(store: Store, folder: Path, *, digests: MapDigests) -> list[Mismatch]:
    kind, key = folder.name.rsplit("-", 1)
    record = store.stored_record(kind, key)
    if not folder.exists():
        return []  # removed meanwhile
    if record is None:
        return [Mismatch(folder.name, RECORD, "a record, here or in records/", _record_state(folder))]
    return mismatches(folder, record, digests=digests)


def _record_state(folder: Path) -> str:
    try:
        Record.read(folder / RECORD)
    except DamagedRecordError as error:
        return error.got
    except OSError as error:
        return error.strerror or "none"
    return "that of another artifact"


def _repair(store: Store, folder: Path, faults: list[Mismatch]) -> str:
    """Restores the record or sets the damaged files aside; returns what was done."""
    kind, key = folder.name.rsplit("-", 1)
    record = store.stored_record(kind, key)
    if record is None or any(fault.invalidates for fault in faults):
        return f"the artifact is set aside in {store.move_aside(folder)}: the next run that needs it makes it again"
    done = []
    if any(fault.file == RECORD for fault in faults):
        write_whole(folder / RECORD, record.sealed)
        done.append("the record is restored from its copy in records/")
    if any(fault.file == METRICS for fault in faults):
        done.append(f"the metrics are set aside in {store.move_aside(folder / METRICS)}")
    return "; ".join(done)


def _verify_copy(store: Store, path: Path) -> Iterator[str]:
    """Checks the seal and name of a copy in records/; a wrong one is replaced by the artifact's own record."""
    try:
        copy = Record.read(path)
        if copy.key == path.stem:
            return
        fault = f"records/{path.name}: expected the record of this key, got that of {copy.key}"
    except DamagedRecordError as error:
        fault = f"records/{path.name}: {error}"
    except OSError as error:
        fault = f"records/{path.name}: cannot be read ({error.strerror})"
    try:
        place = store.move_aside(path)
    except OSError as error:
        yield f"{fault}; left in place ({error.strerror})"
        return
    for own in (store.root / "stages").glob(f"*-{path.stem}"):
        record = store.stored_record(own.name.rsplit("-", 1)[0], path.stem)
        if record is not None:
            write_whole(path, record.sealed)
            yield f"{fault}; set aside in {place}, and rewritten from the artifact's own record"
            return
    yield f"{fault}; set aside in {place}"

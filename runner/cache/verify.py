"""`run verify`: every artifact and record of a cache, byte by byte, against what was recorded when it was finished.

A damaged artifact is set aside, and the next run makes it again. Two files cost less: a record.json is put back from its copy
in records/, and a damaged metrics.jsonl, from which nothing is computed, goes aside alone.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from runner.artifacts import METRICS, RECORD
from runner.cache.integrity import NAME, Damage, Digests, damages
from runner.cache.record import DamagedError, Record
from runner.cache.store import NotWritableError, Store
from runner.files import write_whole
from runner.resources import available_cores


@dataclass
class Findings:
    """What a verification came to."""

    artifacts: int = 0
    records: int = 0  # copies, of artifacts that are here and of others
    faults: list[str] = field(default_factory=list)  # a line each, with what was done about it


def verify(store: Store) -> Findings:
    """Reads the whole cache. Keys that somebody works under are judged as they lie there, and left to them."""
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
    return findings


def _verify_artifact(store: Store, folder: Path, *, digests: Digests) -> list[str]:
    name = NAME.fullmatch(folder.name)
    if name is None or not folder.is_dir():
        return [f"stages/{folder.name}: expected a folder <kind>-<key>; set aside in {store.move_aside(folder)}"]
    faults = _faults(store, folder, digests=digests)
    if not faults:
        return []
    try:
        with store.lock_if_free(name["kind"], name["key"]) as free:
            faults = _faults(store, folder, digests=digests)  # again: whoever held the lock may have changed it
            if not faults:
                return []
            what = _mend(store, folder, faults) if free else "in use, so it is left where it is: verify again later"
    except NotWritableError:
        what = "left where it is, since the cache cannot be written"
    return [f"{fault}; {what}" for fault in faults]


def _faults(store: Store, folder: Path, *, digests: Digests) -> list[Damage]:
    kind, key = folder.name.rsplit("-", 1)
    record = store.record(kind, key)
    if not folder.exists():
        return []  # gone meanwhile
    if record is None:
        return [Damage(folder.name, RECORD, "a record, here or in records/", _record_found(folder))]
    return damages(folder, record, digests=digests)


def _record_found(folder: Path) -> str:
    try:
        Record.unsealed((folder / RECORD).read_bytes())
    except DamagedError as error:
        return error.found
    except OSError as error:
        return error.strerror or "none"
    return "that of another artifact"


def _mend(store: Store, folder: Path, faults: list[Damage]) -> str:
    """Does what the damage of an artifact asks for; returns what it was."""
    kind, key = folder.name.rsplit("-", 1)
    record = store.record(kind, key)
    if record is None or any(fault.matters for fault in faults):
        return f"the artifact is set aside in {store.move_aside(folder)}: the next run that needs it makes it again"
    done = []
    if any(fault.file == RECORD for fault in faults):
        write_whole(folder / RECORD, record.sealed)
        done.append("the record is put back from its copy in records/")
    if any(fault.file == METRICS for fault in faults):
        done.append(f"the metrics are set aside in {store.move_aside(folder / METRICS)}")
    return "; ".join(done)


def _verify_copy(store: Store, path: Path) -> Iterator[str]:
    """A copy in records/ fits its seal and its name; where the artifact is here, its own record is the one that counts."""
    try:
        copy = Record.unsealed(path.read_bytes())
        if copy.key == path.stem:
            return
        fault = f"records/{path.name}: expected the record of this key, found that of {copy.key}"
    except DamagedError as error:
        fault = f"records/{path.name}: {error}"
    except OSError as error:
        fault = f"records/{path.name}: cannot be read ({error.strerror})"
    try:
        place = store.move_aside(path)
    except OSError as error:
        yield f"{fault}; left where it is ({error.strerror})"
        return
    for own in (store.root / "stages").glob(f"*-{path.stem}"):
        record = store.record(own.name.rsplit("-", 1)[0], path.stem)
        if record is not None:
            write_whole(path, record.sealed)
            yield f"{fault}; set aside in {place}, and written anew from the artifact's own"
            return
    yield f"{fault}; set aside in {place}"

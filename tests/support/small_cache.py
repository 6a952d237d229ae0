"""A cache with one artifact of every kind of stage: files with the right names and small content."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.artifacts import (
    METRICS,
    SCRATCH,
    Adapter,
    Artifact,
    Checkpoint,
    Corpus,
    Gguf,
    Parity,
    Release,
    Scores,
    Tokenizer,
    Tokens,
    TrainingState,
    digest_file,
)
from runner.cache.record import Record
from runner.cache.store import Store, Waiting
from runner.stage import Stage
from runner.stages import stage_kinds

MODEL = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
FILES: dict[type[Artifact], list[str]] = {
    Corpus: ["train.jsonl", "validation.jsonl"],
    Tokenizer: ["tokenizer.json", "tokenizer_config.json"],
    Tokens: ["train/index.json", "train/tokens-00000.bin", "validation/index.json", "tokenizer/tokenizer.json"],
    Checkpoint: MODEL,
    TrainingState: [*MODEL, "optimizer.safetensors", "training.json"],
    Adapter: ["adapter_config.json", "adapter_model.safetensors"],
    Scores: ["scores.json", "errors.jsonl"],
    Gguf: ["model-F32.gguf", "Modelfile"],
    Parity: ["parity.json"],
    Release: [*MODEL, "scores.json", "recipe.toml", "README.md", "recipe.lock.json"],
}


def key_for(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def small_cache(root: Path) -> Store:
    store = Store(root)
    for kind in stage_kinds():
        finish(store, kind, key_for(kind))
    return store


def finish(store: Store, kind: str, key: str, *, finished: str = "2026-01-01T00:00:00+00:00", size: int = 1) -> Record:
    stage: Any = stage_kinds()[kind].model_construct()
    work = store.work(stage, key)
    (work / SCRATCH).mkdir(parents=True)
    for name in [*FILES[stage.makes], METRICS]:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(json.dumps({"kind": kind, "file": name}) * size)
    metrics = {"loss": 1e-05, "名": "值", "scores": {}, "train": {"tokens": 1}, "tokens": 1, "steps": 1}
    return store.finish(stage, key, {"identity": {}, "metrics": metrics, "finished": finished, "seconds": 1.0, "inputs": {}})


def flip(path: Path, bit: int) -> None:
    """Flips one bit in place, counted from the start of the file; keeps size, time and inode."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def unnoticed(cache: Path, path: Path, edit: Callable[[Path], object]) -> None:
    """Edits a file so that the memo of digests does not notice, as it would not notice a disk that loses bits."""
    digest = digest_file(path)
    edit(path)
    status, memo = path.stat(), cache / "digests.json"
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    memo.write_text(json.dumps(json.loads(memo.read_text()) | {str(path): [*stamp, digest]}))


def hold(root: Path, stage: Stage, key: str, held: Any, release: Any) -> None:
    """Hold the lock of a key until released: for a process of its own, which can import this module and no test."""
    with Store(root).lock(stage, key, waiting=Waiting()):
        held.set()
        release.wait()

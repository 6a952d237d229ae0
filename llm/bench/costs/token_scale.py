"""Rows from much text: memory of each process, and rows per second, from a warm and from a cold page cache.

    python -m llm.bench.costs.token_scale --processes 8   # 100 GB of text, of which only the tables are on disk
    python -m llm.bench.costs.token_scale --text-gb 4 --written

The files of tokens are holes (made by truncate), which a file system reads as zeros without a disk: so memory, the order of
documents and the work per row are those of the real size, and the wait for a disk is not. With --written they are written, for
a text as large as there is room. Cold: the kernel is told to forget the files, which needs no rights.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from llm.data.token_rows import TokenRows
from llm.data.token_shards import DOCUMENT, META, SHARD_TOKENS, SOURCES, shard_facts

BYTES_PER_TOKEN, TOKENS_PER_DOCUMENT = 4, 1_000  # on average
CONTEXT = 2048
READERS = 8  # as the loader of a training has
EATEN = 400_000  # tokens per second of one fast GPU that trains 215M parameters
SECONDS = 10.0  # of each measurement


def main() -> None:
    """Make the files, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-gb", type=float, default=100.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--written", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as name:
        folder = Path(name)
        documents = make_shards(folder, tokens=int(options.text_gb * 1e9 / BYTES_PER_TOKEN), written=options.written)
        print(f"{options.text_gb:g} GB of text, {documents:,} documents, rows of {CONTEXT} tokens", flush=True)
        for cold in (True, False):
            if cold:
                forget(folder)
            spawned = multiprocessing.get_context("spawn")  # each as a process of a training is
            with ProcessPoolExecutor(options.processes, mp_context=spawned) as pool:
                work = partial(measure, folder, of=options.processes, cold=cold)
                found = list(pool.map(work, range(options.processes)))
            seconds, speed, cost, held = (list(column) for column in zip(*found, strict=True))
            print(f"{'cold' if cold else 'warm'}: first row of an epoch after {max(seconds):.1f} s", flush=True)
            print(
                f"  {sum(speed):,.0f} rows/s by {options.processes} processes, {max(cost):.2f} ms of a core a row", flush=True
            )
            print(f"  needed: {options.processes * EATEN / CONTEXT:,.0f}, by as many GPUs that learn {EATEN:,} tokens/s each")
            print(f"  peak memory of a process, imports and mapped files included: {max(held):,.0f} MiB", flush=True)


def measure(folder: Path, rank: int, *, of: int, cold: bool) -> tuple[float, float, float, float]:
    """Seconds to the first row; rows per second after it, and milliseconds of a core for each; and MiB at most, of one of
    several processes.
    """
    began = time.perf_counter()
    rows = TokenRows(folder, seed=1)
    rows.row(rank)
    seconds = time.perf_counter() - began
    if cold and rank == 0:
        forget(folder)
    used = time.process_time()
    count, passed = read_rows(rows, first=(0 if cold else rows.rows_per_epoch // 2) + rank, step=of)
    cost = 1e3 * (time.process_time() - used) / count
    return seconds, count / passed, cost, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_shards(folder: Path, *, tokens: int, written: bool) -> int:
    """A complete folder of about `tokens` tokens, all of them zeros; returns its number of documents."""
    random = np.random.default_rng(0)
    facts: list[dict[str, int]] = []
    while sum(one["tokens"] for one in facts) < tokens:
        lengths = np.maximum(2, random.lognormal(np.log(TOKENS_PER_DOCUMENT) - 0.5, 1.0, size=2 * SHARD_TOKENS // 1000))
        ends = np.cumsum(lengths.astype(np.int64))
        count = int(np.searchsorted(ends, min(SHARD_TOKENS, tokens)))
        table = np.zeros(count, dtype=DOCUMENT)
        table["tokens"] = np.diff(ends[:count], prepend=0)
        table["start"] = ends[:count] - table["tokens"]
        table["bytes"], table["passes"] = table["tokens"] * BYTES_PER_TOKEN, 1
        path = folder / f"shard-{len(facts):05}.npy"
        np.save(path, table)
        size = 2 * int(table["tokens"].sum())
        with path.with_suffix(".bin").open("wb") as file:
            if written:
                file.write(bytes(size))
                file.flush()
                os.fsync(file.fileno())  # the kernel forgets no page that is not on disk
            file.truncate(size)
        facts.append(shard_facts(table))
    totals = {name: sum(one[name] for one in facts) for name in ("documents", "tokens", "bytes", "epoch_tokens")}
    about = {"vocab_size": 32_000, "context": CONTEXT, "padding": 0, "dtype": "uint16"}
    (folder / SOURCES).write_text('[""]')
    (folder / META).write_text(json.dumps(about | totals | {"shards": facts}))
    return totals["documents"]


def forget(folder: Path) -> None:
    """Drop the files of the folder from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rows(rows: TokenRows, *, first: int, step: int) -> tuple[int, float]:
    """How many rows as many threads as a training has read, each `step` after the last, and in how many seconds."""
    count, began = 0, time.perf_counter()
    with ThreadPoolExecutor(READERS) as readers:
        while time.perf_counter() - began < SECONDS:
            at_once = 32  # a step of 8 GPUs has 32 rows each, with half a million tokens
            places = range(first + count * step, first + (count + at_once) * step, step)
            for _ in readers.map(rows.row, places):
                count += 1
    return count, time.perf_counter() - began


if __name__ == "__main__":
    main()

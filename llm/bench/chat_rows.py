"""Chats as rows of a training: rows per second and seconds of a core for each, by one process and by all cores.

    python -m llm.bench.chat_rows --rows 40000

The chats are made of random words, of lengths as instructions have them, with the chat template of this project.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from random import Random

from llm.data.chat_dataset import write_rows
from llm.data.chat_parts import Table
from llm.data.conversations import Template
from llm.text.executor import LocalProcesses
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe

CONTEXT = 2048
MILLIONS = 5  # of chats, that the result is extrapolated to


def main() -> None:
    """Make the chats, pack them, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # else the tokenizer of one process takes all cores
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as name:
        folder = Path(name)
        tokenizer, size = make_chats(folder / "chats.jsonl", rows=options.rows)
        print(f"{options.rows:,} chats of {size / options.rows:,.0f} bytes", flush=True)
        for cores in options.cores:
            used, began = _cpu_seconds(), time.perf_counter()
            write_rows(
                folder / f"rows-{cores}",
                [Table((folder / "chats.jsonl",), Template())],
                tokenizer=tokenizer,
                context=CONTEXT,
                executor=LocalProcesses(cores),
                report=lambda **_: None,
                should_stop=lambda: False,
            )
            seconds, cpu = time.perf_counter() - began, _cpu_seconds() - used
            print(
                f"{cores} processes: {options.rows / seconds:,.0f} rows/s, {1e3 * cpu / options.rows:.3f} ms of a core a row; "
                f"{MILLIONS} million: {MILLIONS * 1e6 * cpu / options.rows / cores / 60:.0f} minutes of {cores} free cores",
                flush=True,
            )
    peaks = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print("peak memory: {:,.0f} MiB, and {:,.0f} MiB of a process that it started".format(*peaks))


def make_chats(path: Path, *, rows: int) -> tuple[TextTokenizer, int]:
    """Write chats to a file; a tokenizer for them, and the size of the file in bytes."""
    random = Random(0)
    words = ["".join(random.choices("etaoinshrdlucmfwyp", k=random.randint(2, 9))) for _ in range(20_000)]

    def text(mean: float) -> str:
        return " ".join(random.choices(words, k=1 + int(random.expovariate(1 / mean))))

    with path.open("w") as file:
        for _ in range(rows):
            turns = [("user", 40.0), ("assistant", 150.0)] * random.choice([1, 1, 1, 2, 3])
            file.write(json.dumps({"messages": [{"role": role, "content": text(mean)} for role, mean in turns]}) + "\n")
    sample = [text(200) for _ in range(200)]
    return train_bpe(sample, 8192, min_frequency=2, pre_tokenizer_name="gpt-2", allow_smaller=True), path.stat().st_size


def _cpu_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


if __name__ == "__main__":
    main()

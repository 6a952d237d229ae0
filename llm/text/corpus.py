"""Builds a cleaned corpus from sources: one pass over shards, one merge over hashes, one filter into two files.

The result depends only on the sources and the config, not on the number of cores or on how rows were cut into shards.
"""

import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from llm.errors import InputError, Interrupted
from llm.files import whole_file
from llm.text.attribution import count_value
from llm.text.deduplication import EXACT, KEPT, NEAR, find_duplicates
from llm.text.executor import Executor
from llm.text.shards import EXAMPLES, CorpusConfig, ShardFolder, process_shard
from llm.text.sources import Source, cut_into_shards

PLACES = 5  # files that an error names at most
FEW, MOST_NEAR = 20, 0.5  # documents of a source, and the share of them that may be near-duplicates without a warning
TOTALS = ("read", "kept", "train", "validation", "characters", "bytes", "passes")
REASONS = {EXACT: "exact_duplicate", NEAR: "near_duplicate"}


def build_corpus(
    sources: Sequence[Source],
    config: CorpusConfig,
    *,
    train: Path,
    validation: Path,
    scratch: Path,
    executor: Executor,
    shard_bytes: int,
    report: Callable[..., None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Write the documents to `train` and `validation`; return counts, in total and per source.

    Finished shards stay in `scratch` and are reused by the next call with the same rows and config.
    InputError if a row is bad (unless the config skips it) or if no document is left.
    """
    folder = scratch / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob("*.*"):  # of a run that was killed
        shutil.rmtree(unfinished)
    picklable = [replace(source, files=(), rows=None) for source in sources]
    work = functools.partial(process_shard, sources=picklable, config=config, folder=folder)
    shards: list[ShardFolder] = []
    read = 0
    for shard in executor.map(work, cut_into_shards(sources, shard_bytes)):
        shards.append(shard)
        read += shard.summary["read"]
        report(done=read, total=None, unit="documents")
        if should_stop():
            raise Interrupted
    report(note=f"looking for duplicates among {sum(shard.summary['documents'] for shard in shards):,} documents")
    verdicts = find_duplicates(shards, similarity=config.similarity, scratch=scratch)
    if should_stop():
        raise Interrupted
    with whole_file(train) as train_path, whole_file(validation) as validation_path:
        with train_path.open("wb") as train_file, validation_path.open("wb") as validation_file:
            counts = _filter(shards, verdicts, len(sources), train=train_file, validation=validation_file)
        for source, of_source in zip(sources, counts, strict=True):
            if warning := _swallowed(of_source):
                report(note=f"warning: {source.name}: {warning}")
        totals = {key: sum(of_source[key] for of_source in counts) for key in TOTALS}
        if not totals["train"]:
            raise InputError(_nothing_left(sources, totals, counts))
    return {**totals, "sources": {source.name: of_source for source, of_source in zip(sources, counts, strict=True)}}


def _filter(
    shards: Iterable[ShardFolder], verdicts: NDArray[np.uint8], sources: int, *, train: IO[bytes], validation: IO[bytes]
) -> list[dict[str, Any]]:
    """Write the kept documents shard by shard; counts per source."""
    counts: list[dict[str, Any]] = [
        {
            **dict.fromkeys(TOTALS, 0),
            "dropped": Counter(),
            "languages": Counter(),
            "licenses": Counter(),
            "origins": Counter(),
            "bad_rows": [],
        }
        for _ in range(sources)
    ]
    start = 0
    for shard in shards:
        summary, facts = shard.summary, shard.facts()
        verdict = verdicts[start : start + len(facts)]
        start += len(facts)
        lines = shard.documents().split(b"\n")
        kept = verdict == KEPT
        held_out = facts["validation"]
        train.writelines(lines[i] + b"\n" for i in np.flatnonzero(kept & ~held_out))
        validation.writelines(lines[i] + b"\n" for i in np.flatnonzero(kept & held_out))

        of_source = counts[summary["source"]]
        of_source["read"] += summary["read"]
        of_source["kept"] += int(kept.sum())
        of_source["train"] += int((kept & ~held_out).sum())
        of_source["validation"] += int((kept & held_out).sum())
        of_source["characters"] += int(facts["characters"][kept].sum(dtype=np.int64))
        of_source["bytes"] += int(facts["bytes"][kept].sum(dtype=np.int64))
        of_source["passes"] += int(facts["passes"][kept & ~held_out].sum(dtype=np.int64))
        of_source["dropped"].update(summary["dropped"])
        of_source["dropped"].update({reason: n for key, reason in REASONS.items() if (n := int((verdict == key).sum()))})
        of_source["bad_rows"] += summary["bad_rows"][: EXAMPLES - len(of_source["bad_rows"])]
        named = summary["attributions"]
        documents = np.bincount(facts["attribution"][kept], minlength=len(named)).tolist()
        for values, count in zip(named, documents, strict=True):
            for name, value in zip(("licenses", "origins", "languages"), values, strict=True):
                count_value(of_source[name], value, count)
    return counts


def _swallowed(of_source: dict[str, Any]) -> str | None:
    """What to say of a source of which near-duplicates are the most."""
    near = of_source["dropped"].get(REASONS[NEAR], 0)
    documents = of_source["kept"] + near + of_source["dropped"].get(REASONS[EXACT], 0)
    if documents < FEW or near <= MOST_NEAR * documents:
        return None
    return (
        f"{near:,} of {documents:,} documents are near-duplicates of others, and were dropped; where they share a template "
        'that is worth learning, raise "similarity" or set near_duplicates = false'
    )


def _nothing_left(sources: Sequence[Source], totals: dict[str, int], counts: list[dict[str, Any]]) -> str:
    places = [place for source in sources for place in (*map(str, source.files), source.place) if place]
    dropped: Counter[str] = sum((of_source["dropped"] for of_source in counts), Counter())
    reasons = [f"{reason} {count:,}" for reason, count in dropped.most_common()]
    held_out = [f"held out for validation {totals['validation']:,}"] if totals["validation"] else []
    more = f" and {len(places) - PLACES:,} more" if places[PLACES:] else ""
    return (
        f"{', '.join(places[:PLACES])}{more}: expected documents to train on, got none of {totals['read']:,} rows: "
        f"{', '.join(reasons + held_out) or 'there are no rows'}; loosen the rule that drops them, or add text"
    )

"""What validation looks at, and what it says of each source."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import VOCABULARY, tiny_model, tiny_training
from torch.nn.functional import cross_entropy

from llm.data.packing import PackedRows, StreamWriter
from llm.data.token_rows import TokenRows
from llm.data.token_shards import TokenWriter
from llm.training.distributed.process_group import ProcessGroup
from llm.training.loss import Learner, next_token_loss
from llm.training.validation import Validation, even_sample, validation_losses

LENGTHS = {"en": [5, 40, 9, 17, 30, 8], "zh": [33, 4, 12, 21], "code": [7]}
BYTES = {"en": 4, "zh": 3, "code": 2}  # of a token


def documents() -> list[tuple[str, list[int]]]:
    random = np.random.default_rng(4)
    return [(source, random.integers(VOCABULARY, size=length).tolist()) for source in LENGTHS for length in LENGTHS[source]]


def written(folder: Path) -> Path:
    with TokenWriter(folder, vocab_size=VOCABULARY, context=24, padding=0, shard_tokens=60) as writer:
        for source, ids in documents():
            writer.append(ids, passes=1, text_bytes=BYTES[source] * len(ids), source=source)
        writer.finish()
    return folder


def measured(model: Any, validation: Validation) -> dict[str, float]:
    learner = Learner(model, next_token_loss, precision="fp32")
    return validation_losses(learner, validation, group=ProcessGroup(), micro_batch=3, should_stop=lambda: False)


def test_each_source_has_the_loss_of_its_own_targets_and_the_bits_of_its_own_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny_model(context=64)
    rows = TokenRows(written(tmp_path), context=64, seed=None)
    found = measured(model, Validation(rows, sources=rows.sources))
    nats, targets, text_bytes = (dict.fromkeys(LENGTHS, 0.0) for _ in range(3))
    place, cuts = 0, set(range(0, 10_000, 64))
    for source, ids in sorted(documents(), key=lambda one: (list(LENGTHS).index(one[0]), len(one[1]))):
        borders = sorted({0, len(ids)} | {cut - place for cut in cuts if 0 < cut - place < len(ids)})  # where rows are cut
        for first, last in pairwise(borders):
            piece = torch.tensor(ids[first : last + 1])
            logits = model(piece[None, : last - first])[0, : len(piece) - 1]
            nats[source] += cross_entropy(logits, piece[1:], reduction="sum").item()
            targets[source] += len(piece) - 1
        text_bytes[source] += BYTES[source] * len(ids)
        place += len(ids)
    for source in LENGTHS:
        assert found[f"validation_loss/{source}"] == pytest.approx(nats[source] / targets[source], rel=1e-5)
        bits = nats[source] / math.log(2) / text_bytes[source]
        assert found[f"validation_bits_per_byte/{source}"] == pytest.approx(bits, rel=1e-5)
    assert found["validation_loss"] == pytest.approx(sum(nats.values()) / sum(targets.values()), rel=1e-5)
    whole = sum(nats.values()) / math.log(2) / sum(text_bytes.values())
    assert found["validation_bits_per_byte"] == pytest.approx(whole, rel=1e-5)


def test_a_small_sample_has_every_source_in_its_share(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, vocab_size=VOCABULARY, context=24, padding=0) as writer:
        for source, count in (("en", 300), ("zh", 100)):
            for number in range(count):
                writer.append([number % 30] * (10 + number % 50), passes=1, text_bytes=1, source=source)
        writer.finish()
    rows = TokenRows(tmp_path, seed=None)
    chosen = even_sample(rows.rows_per_epoch, 40)
    sources = np.concatenate([rows.row(index).sources for index in chosen])
    assert 0.2 < (sources == 1).mean() < 0.3
    lengths = [np.bincount(rows.row(index).documents).max() for index in chosen]  # of the longest document in each
    assert min(lengths) < 15 and max(lengths) == 24
    found = measured(tiny_model(), Validation(rows, sources=rows.sources, tokens=40 * 24))
    assert {"validation_loss/en", "validation_loss/zh"} <= found.keys()


@given(st.integers(1, 5000), st.integers(0, 300))
def test_a_sample_is_spread_evenly_and_has_no_row_twice(rows: int, count: int) -> None:
    chosen = even_sample(rows, count)
    assert len(set(chosen)) == len(chosen) == max(1, min(rows, count))
    assert chosen == sorted(chosen) == even_sample(rows, count)
    assert chosen[0] >= 0 and chosen[-1] < rows
    widest = -(-rows // len(chosen))
    assert all(after - before < 2 * widest for before, after in pairwise(chosen))


def test_what_a_sample_measures_is_per_byte_of_its_own_text(tmp_path: Path) -> None:
    rows = TokenRows(written(tmp_path), seed=None)
    model = tiny_model()
    (index,) = even_sample(rows.rows_per_epoch, 1)
    row = rows.row(index)
    found = measured(model, Validation(rows, tokens=24))
    logits = model(torch.tensor(row.tokens)[None], documents=torch.tensor(row.documents)[None])
    nats = cross_entropy(logits[0], torch.tensor(row.targets), reduction="sum").item()
    assert row.text_bytes is not None
    assert found["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / row.text_bytes.sum(), rel=1e-5)


def test_every_table_of_chats_has_a_loss_of_its_own(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    with StreamWriter(tmp_path / "rows") as writer:
        for number in range(20):
            ids = random.integers(VOCABULARY, size=random.integers(4, 20)).tolist()
            writer.append(ids, [place > 2 for place in range(len(ids))], full_length=len(ids))
            writer.end_group(1, source=number % 2)
        writer.pack(row_lengths=[24], padding=0)
    rows = PackedRows(tmp_path / "rows", seed=None)
    found = measured(tiny_model(), Validation(rows, sources=["table-1", "table-2"]))
    shares = np.bincount(np.concatenate([row.sources[row.targets >= 0] for row in map(rows.row, range(rows.rows_per_epoch))]))
    mean = (shares * [found["validation_loss/table-1"], found["validation_loss/table-2"]]).sum() / shares.sum()
    assert found["validation_loss"] == pytest.approx(mean, rel=1e-6)
    assert found["validation_loss/table-1"] != found["validation_loss/table-2"]
    assert "validation_bits_per_byte" not in found


def test_a_training_reports_and_keeps_what_each_source_has(tmp_path: Path) -> None:
    rows = TokenRows(written(tmp_path / "held-out"), seed=None)
    lines: list[dict[str, Any]] = []
    validation = Validation(rows, sources=rows.sources)
    metrics = tiny_training(tiny_model(), tmp_path / "scratch", validation=validation, lines=lines)
    names = {f"validation_{what}/{source}" for what in ("loss", "bits_per_byte") for source in LENGTHS}
    assert names <= metrics.keys()
    assert all(names <= line.keys() for line in lines if "validation_loss" in line)
    json.dumps(lines)

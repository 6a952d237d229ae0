"""The parts of the bench whose results do not depend on the speed of this machine."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm.bench import decode, head, labels, learning, matmul, train_step
from llm.bench.costs import memory, overhead
from llm.bench.implementations import (
    CountingRows,
    StockpotTraining,
    TransformersTraining,
    build_stockpot_model,
    build_transformers_model,
)
from llm.bench.timing import Timings, interleaved, ratio
from llm.bench.workload import Workload, reference_workload
from llm.data.batch import IGNORE
from llm.data.token_shards import TokenWriter
from llm.training.config import Schedule
from llm.training.distributed.process_group import ProcessGroup

CPU = torch.device("cpu")


def tiny(**changes: Any) -> Workload:
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 32}
    fields = {
        "architecture": sizes,
        "vocab_size": 80,
        "context": 32,
        "rows": 4,
        "precision": "fp32",
        "compiled": False,
        "cores": 1,
    }
    return Workload.model_validate(fields | changes)


def ours_of(workload: Workload, **changes: Any) -> StockpotTraining:
    return StockpotTraining(workload, build_stockpot_model(workload), group=ProcessGroup(), **changes)


def theirs_of(ours: StockpotTraining) -> TransformersTraining:
    weights = {name: weight.clone() for name, weight in ours.model.state_dict().items()}
    return TransformersTraining(ours.workload, weights, steps=[parts for parts, _ in ours.prepared], device=CPU)


def test_a_workload_equals_itself_after_json() -> None:
    workload = reference_workload(cores=2)
    assert Workload.model_validate_json(workload.model_dump_json()) == workload


def test_the_reference_workload_has_the_published_size() -> None:
    workload = reference_workload(cores=2)
    assert sum(weight.numel() for weight in build_stockpot_model(workload).parameters()) == 28_844_544
    assert (workload.rows, workload.context, workload.tokens_per_step) == (8, 512, 4096)


def test_candidates_take_turns_and_warm_up_does_not_count() -> None:
    order: list[str] = []
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, device=CPU)
    assert [len(timings.rounds) for timings in found.values()] == [3, 3]
    assert "".join(order) == "ab" + "ab" + "ab" + "ba" + "ab"  # first calls, second calls, and three rounds to and fro


def test_a_ratio_is_the_median_of_the_ratios_of_rounds() -> None:
    timings = {"slow": Timings(9.0, [4.0, 80.0, 6.0]), "fast": Timings(1.0, [2.0, 20.0, 2.0])}
    assert ratio(timings, "slow", "fast") == 3.0
    assert timings["slow"].once == 3.0


def test_rows_count_in_strides_of_one_to_three() -> None:
    rows = CountingRows(32, 80)
    strides = set()
    for index in range(20):
        row = rows.row(index)
        (stride,) = set((np.diff(row.tokens) % 61).tolist())
        strides.add(stride)
        assert row.targets[:-1].tolist() == row.tokens[1:].tolist() and row.targets[-1] == IGNORE
        assert not row.documents.any()
    assert strides == {1, 2, 3}


@pytest.mark.parametrize("tied", [True, False])
def test_both_start_from_the_same_loss_and_learn(tied: bool) -> None:
    sizes = tiny().architecture.model_copy(update={"tied": tied})
    ours = ours_of(tiny(architecture=sizes.model_dump()))
    theirs = theirs_of(ours)
    before = ours.loss(ours.prepared[0][0][0])
    assert theirs.loss(ours.prepared[0][0][0]) == pytest.approx(before, rel=1e-5)
    for _ in range(30):
        ours.step()
        theirs.step("fp32")
    assert ours.loss(ours.prepared[0][0][0]) < before - 0.5
    assert theirs.loss(ours.prepared[0][0][0]) < before - 0.5


def test_transformers_micro_batches_have_the_gradient_of_the_step() -> None:
    found = []
    for micro_batch in (1, 4):
        ours = ours_of(tiny(micro_batch=micro_batch))
        theirs = theirs_of(ours)
        assert len(ours.prepared[0][0]) == 4 // micro_batch
        theirs.step("fp32")
        found.append(dict(theirs.model.named_parameters())["model.layers.0.mlp.up_proj.weight"].detach())
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)


def test_transformers_is_built_with_what_the_architecture_says() -> None:
    config: Any = build_transformers_model(tiny(), None).config
    assert (config.num_key_value_heads, config.vocab_size, config.eos_token_id) == (2, 80, None)
    assert config._attn_implementation == "sdpa"


def test_the_peak_is_the_fastest_of_square_and_model_shaped_products() -> None:
    workload = tiny()
    shapes = matmul.shapes(build_stockpot_model(workload), tokens=workload.tokens_per_step, device=CPU)
    assert (1024, 1024, 1024) in shapes and (128, 32, 80) in shapes  # a square, and the head
    found = matmul.measure_matmul([(64, 64, 64), (128, 32, 80)], seconds=0.01, device=CPU)
    for precision in ("fp32", "bf16"):
        assert found[precision]["gflops"] == max(found[precision]["shapes"].values()) > 0
        assert matmul.shown(tuple(found[precision]["shape"])) in found[precision]["shapes"]


def test_shares_of_the_peak_are_computed_from_speeds() -> None:
    workload = tiny(optimizer={"kind": "muon"})
    peaks = {name: {"shape": [64, 64, 64]} for name in ("fp32", "bf16")}
    found = train_step.measure_train_step(workload, peaks, seconds=0.01, compiled=False, group=ProcessGroup())
    assert set(found["candidates"]) == {"ours", "ours_muon", "transformers_fp32", "transformers_bf16"}
    assert found["first_loss"]["ours"] == pytest.approx(found["first_loss"]["transformers"], rel=1e-4)
    flops = build_stockpot_model(workload).flops_per_token(workload.context)
    for one in found["candidates"].values():
        assert one["tokens_per_second"] == pytest.approx(workload.tokens_per_step / one["seconds_per_step"])
        reached = [flops * workload.tokens_per_step / taken / 1e9 for taken in one["rounds"]]
        shares = [mine / peak for mine, peak in zip(reached, found["peak_gflops"], strict=True)]
        assert one["share_of_peak"] == pytest.approx(np.median(shares))


@pytest.mark.usefixtures("compiled_code")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_taught_model_decodes_as_transformers_does(compiled: bool) -> None:
    workload, group = tiny(), ProcessGroup()
    found = decode.measure_decode(workload, build_stockpot_model(workload), seconds=0.0, compiled=compiled, group=group)
    assert found["least_margin"] > 3.0  # so that equal tokens are no chance
    for batch, one in found["batch"].items():
        assert one["ours_same_prompts"] == int(batch)
        assert min(one["ours"], one["transformers"], one["ours_times_as_fast"]) > 0
    if compiled:
        assert found["compiling_seconds"] > 0
        assert found["batch"]["1"]["ours_compiled_same_prompts"] == 1
        assert found["batch"]["1"]["ours_compiled_times_as_fast"] > 0 and "ours_compiled" not in found["batch"]["8"]


def test_the_head_is_timed_for_each_vocabulary() -> None:
    found = head.measure_head(4, seconds=0.0, device=CPU, vocabularies=(50, 20_000))
    assert [one["chunk_rows"] for one in found["vocabularies"].values()] == [1024, 512]
    for vocabulary, one in found["vocabularies"].items():
        assert one["seconds_per_gflop"] == pytest.approx(one["seconds"] / (6e-9 * 1024 * 4 * int(vocabulary)))
        assert min(one["time_of_at_once"], one["seconds_at_once"]) > 0


def test_labels_after_a_shared_prompt_are_as_likely_as_in_a_pass_of_their_own() -> None:
    workload = tiny()
    found = labels.measure_labels(workload, build_stockpot_model(workload), seconds=0.0, device=CPU)
    assert found["largest_difference"] < 1e-5
    assert min(found["shared"], found["full"], found["shared_times_as_fast"]) > 0


class Clockwork:
    """A tracker whose process has used one second more at each call."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.looks = 0

    def report(self, **values: Any) -> None:
        self.lines.append(values)

    def processor_seconds(self) -> float:
        self.looks += 1
        return float(self.looks)


def test_overheads_are_shares_of_a_bare_step(tmp_path: Path) -> None:
    workload, tracking = tiny(), Clockwork()
    rows = overhead.made_up_rows(tmp_path / "tokens", workload)
    found = overhead.measure_overhead(
        workload,
        rows,
        tracking=tracking,
        checkpoint_every=50,
        checkpoint_minutes=None,
        seconds=0.01,
        scratch=tmp_path / "checkpoints",
        group=ProcessGroup(),
    )
    assert found["total"] == pytest.approx(found["data"] + found["tracking"] + found["checkpoints"])
    seconds, steps = found["seconds"], found["steps"]
    assert steps >= 10 and len(tracking.lines) == steps // 10
    assert seconds["tracker"] == pytest.approx(1.0 / steps)
    assert found["tracking"] == pytest.approx((seconds["reporting"] + seconds["tracker"]) / seconds["bare_step"])
    assert found["data"] == pytest.approx((seconds["waiting_for_batches"] + seconds["loading_batches"]) / seconds["bare_step"])
    assert found["checkpoints"] == pytest.approx(
        (seconds["copying_state"] + seconds["writing_state"]) / (50 * seconds["bare_step"])
    )
    assert min(seconds.values()) > 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_the_shorter_of_two_checkpoint_intervals_counts() -> None:
    assert overhead.interval_seconds(2.0, every=10, minutes=5.0) == 20.0
    assert overhead.interval_seconds(2.0, every=None, minutes=5.0) == 300.0
    assert math.isinf(overhead.interval_seconds(2.0, every=None, minutes=None))


def test_learning_gives_both_the_same_time_text_and_measure(tmp_path: Path) -> None:
    """On text that counts, so that both learn something: bits per byte fall below chance."""
    workload = tiny(optimizer={"kind": "muon"})
    for name, documents in (("train", 400), ("held_out", 20)):
        with TokenWriter(tmp_path / name, vocab_size=80, context=32, padding=0) as writer:
            for start in range(documents):
                writer.append([(start * 7 + train_step) % 80 for train_step in range(40)], passes=1, text_bytes=40)
            writer.finish()
    said: list[str] = []
    found = learning.measure_learning(
        workload,
        learning.Text(tmp_path / "train", tmp_path / "held_out"),
        schedule=Schedule(learning_rate=3e-3),
        seconds=1.5,
        scratch=tmp_path / "scratch",
        say=said.append,
    )
    for name in ("ours", "plain"):
        one = found[name]
        assert one["tokens"] == one["steps"] * 128 and one["steps"] > 10
        assert one["bits_per_byte"] < math.log2(80) - 0.5
        assert any(line.startswith(f"{name}: ") for line in said)
    assert found["ours"]["optimizer"] == "muon" and found["plain"]["optimizer"] == "adamw"
    assert found["bits_per_byte_below"] == pytest.approx(found["plain"]["bits_per_byte"] - found["ours"]["bits_per_byte"])


@pytest.mark.long
def test_peak_memory_of_a_step_does_not_grow_with_the_square_of_a_row() -> None:
    found = memory.measure_contexts(tiny(), (1024, 3072, 5120))  # scores of the last are 400 MiB a layer
    first, second = (found[longer] - found[longer - 2048] for longer in (3072, 5120))
    assert second < 1.5 * first

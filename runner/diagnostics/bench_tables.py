"""The result of `run bench` as tables for people."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from runner.terminal import console

Result = Mapping[str, Any]
Titled = tuple[str, Table]

DECODERS = {
    "ours": "ours, bf16",
    "ours_compiled": "ours, bf16, compiled",
    "transformers": "Transformers, bf16",
    "llama_cpp_bf16": "llama.cpp, bf16",
    "llama_cpp_q8_0": "llama.cpp, q8_0",
}
CANDIDATES = {
    "ours": "ours, AdamW",
    "ours_muon": "ours, Muon",  # if the recipe uses it
    "transformers_fp32": "Transformers, fp32 eager",
    "transformers_bf16": "Transformers, bf16 autocast",
    "transformers_bf16_compiled": "Transformers, bf16 compiled",
}
PROCESSES = {"one": "1 process", "ddp": "2 processes, ddp", "fsdp": "2 processes, fsdp"}
LEARNING = {"ours": "ours, as the recipe trains", "plain": "Transformers, AdamW at 3e-3"}


def show(result: Result) -> None:
    """Prints the result on standard output."""
    out = console(sys.stdout)
    machine, model = result["machine"], result["model"]
    out.print(
        f"{model['parameters']:,} parameters, {model['rows']} x {model['context']} tokens a step, "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"transformers {machine['versions']['transformers']}",
    )
    for name, tables in TABLES.items():
        for title, table in tables(result[name]) if name in result else ():
            out.print(f"\n{title}", style="bold")
            out.print(table)


def _matmul(found: Result) -> Iterator[Titled]:
    def product(rows: int, inner: int, columns: int) -> str:
        return f"{rows}x{inner} @ {inner}x{columns}"

    rows = [[name, f"{one['gflops']:,.0f}", product(*one["shape"])] for name, one in found.items()]
    yield "Matrix products", _table(["precision", "GFLOP/s", "fastest shape"], rows)


def _train(found: Result) -> Iterator[Titled]:
    rows = []
    for name, one in found["candidates"].items():
        times = f"{one['ours_times_as_fast']:.2f}" if "ours_times_as_fast" in one else ""
        rows.append([CANDIDATES[name], f"{one['tokens_per_second']:,.0f}", times, f"{one['share_of_peak']:.0%}"])
    headings = ["step", "tokens/s", "ours is x times", f"of {found['precision']} peak"]
    yield "Training: the same weights, rows of one document, fused AdamW", _table(headings, rows)


def _decode(found: Result) -> Iterator[Titled]:
    rows = []
    for batch, one in found["batch"].items():
        for name, mark in (("ours", ""), ("ours_compiled", ", compiled")):
            if name in one:
                same = one[f"{name}_same_prompts"]
                speeds = [f"{one[name]:,.0f}", f"{one['transformers']:,.0f}", f"{one[f'{name}_times_as_fast']:.2f}"]
                rows.append([batch + mark, *speeds, "yes" if str(same) == batch else f"of {same} in {batch}"])
    headings = ["batch", "ours", "Transformers", "ours is x times", "same tokens"]
    lengths = f"{found['prompt_tokens']} tokens read, {found['new_tokens']} made"
    yield f"Decoding, tokens/s: greedy, {found['dtype']}, {lengths}", _table(headings, rows)


def _decode_model(found: Result) -> Iterator[Titled]:
    candidates = found["candidates"]
    rows = [
        [
            DECODERS[name],
            f"{one['tokens_per_second']:,.1f}",
            f"{one['tokens_per_second'] * found['weight_bytes'] / 1e9:,.1f} GB/s" if name != "llama_cpp_q8_0" else "",
            f"{one['prefill_tokens_per_second']:,.0f}",
        ]
        for name, one in candidates.items()
    ]
    title = (
        f"Decoding of one text, tokens/s: greedy, {found['threads']} threads, {found['prompt_tokens']} tokens read, "
        f"{found['new_tokens']} made; the fastest turn of each"
    )
    yield title, _table(["", "decoding", "of weights", f"prefill of {found['prefill_tokens']}"], rows)


def _labels(found: Result) -> Iterator[Titled]:
    row = [f"{found['shared']:,.1f}", f"{found['full']:,.1f}", f"{found['shared_times_as_fast']:.2f}"]
    headings = ["a prompt read once", "with each label", "once is x times", "largest difference"]
    lengths = f"{found['labels']} labels after {found['prompt_tokens']} tokens"
    title = f"Classification, prompts/s: {found['dtype']}, {lengths}"
    yield title, _table(headings, [[*row, f"{found['largest_difference']:.0e}"]])


def _memory(found: Result) -> Iterator[Titled]:
    headings = ["ours", "Transformers, fp32 eager", "share"]
    row = [_mebibytes(found["ours"]), _mebibytes(found["transformers_fp32"]), f"{found['share']:.0%}"]
    yield f"Peak memory of a step: {found['what']}", _table(headings, [row])


def _overhead(found: Result) -> Iterator[Titled]:
    title = f"Overhead, at most this share of step time (tracker: {found['tracker']}; rows: {found['rows']})"
    row = [f"{found[name]:.2%}" for name in ("data", "tracking", "checkpoints", "total")]
    yield title, _table(["data", "tracking", "checkpoints", "together"], [row])


def _processes(found: Result) -> Iterator[Titled]:
    rows = [
        [PROCESSES[name], f"{one['tokens_per_second']:,.0f}", f"{one['share_of_one']:.2f}"]
        for name, one in found["candidates"].items()
    ]
    title = f"Processes: the same step on {found['threads']} CPU threads, over gloo"
    yield title, _table(["training", "tokens/s", "of one process"], rows)


def _lora(found: Result) -> Iterator[Titled]:
    titles = {"full": "all weights", "lora": f"LoRA, r = {found['r']}", "qlora": f"QLoRA, r = {found['r']}"}
    rows = [
        [
            titles[name],
            f"{one['trained_parameters']:,}",
            f"{one['trained_share']:.2%}",
            f"{one['seconds_per_step']:.3f} s",
            f"{one['time_of_full']:.2f}",
            _mebibytes(one["peak_memory_bytes"]),
            f"{one['memory_of_full']:.2f}",
        ]
        for name, one in found["ways"].items()
    ]
    headings = ["trained", "weights", "share", "step", "of full", "peak memory", "of full"]
    yield "Fine-tuning: the same model and step", _table(headings, rows)
    if "base" in found:
        base = found["base"]
        row = [_mebibytes(base["nf4_bytes"]), _mebibytes(base["bf16_bytes"]), f"{base['nf4_of_bf16']:.3f}"]
        yield "Weights of the base", _table(["nf4", "bf16", "nf4 of bf16"], [row])


def _peft(found: Result) -> Iterator[Titled]:
    rows = []
    for one in found["candidates"].values():
        title = (
            f"{'ours' if 'ours_times_as_fast' not in one else 'Transformers and PEFT'}, {one['rows_at_a_time']} rows at a time"
        )
        times, share = (f"{one[key]:.2f}" if key in one else "" for key in ("ours_times_as_fast", "our_share_of_memory"))
        rows.append([title, f"{one['tokens_per_second']:,.0f}", times, _mebibytes(one["peak_memory_bytes"]), share])
    headings = ["step", "tokens/s", "ours is x times", "peak memory", "our share"]
    losses = found["first_loss"]
    title = (
        f"Adapter, r = {found['r']}, {found['precision']}: first loss {losses['ours']:.4f}, stock {losses['transformers']:.4f}"
    )
    yield title, _table(headings, rows)


def _head(found: Result) -> Iterator[Titled]:
    rows = [
        [
            f"{int(name):,}",
            f"{one['seconds']:.2f} s",
            f"{one['seconds_per_gflop'] * 1e3:.2f} ms",
            f"{one['time_of_at_once']:.2f}",
        ]
        for name, one in found["vocabularies"].items()
    ]
    title = f"Head and loss of {found['positions']} positions of {found['hidden_size']} channels, {found['precision']}"
    yield title, _table(["vocabulary", "with gradients", "per GFLOP", "of all logits at once"], rows)


def _context(found: Result) -> Iterator[Titled]:
    lengths = sorted(map(int, found))  # names in JSON
    rows, before = [], None
    for length in lengths:
        peak = found[str(length)]
        slope = "" if before is None else f"{(peak - found[str(before)]) / (length - before) / 1024:,.0f} KiB"
        rows.append([f"{length:,}", _mebibytes(peak), slope])
        before = length
    yield "Peak memory of a step on one row", _table(["positions", "peak", "each position more"], rows)


def _learning(found: Result) -> Iterator[Titled]:
    rows = [
        [LEARNING[name], f"{one['steps']:,}", f"{one['seconds']:,.0f}", f"{one['bits_per_byte']:.3f}"]
        for name, one in found.items()
        if name in LEARNING
    ]
    seconds, below = found["seconds_wanted"], found["bits_per_byte_below"]
    title = f"Learning: held-out text after {seconds:,.0f} s; ours is {below:.3f} below"
    yield title, _table(["training", "steps", "seconds", "bits per byte"], rows)


TABLES = {
    "matmul": _matmul,
    "train": _train,
    "decode": _decode,
    "labels": _labels,
    "memory": _memory,
    "machinery": _overhead,
    "processes": _processes,
    "lora": _lora,
    "peft": _peft,
    "decode_model": _decode_model,
    "head": _head,
    "context": _context,
    "learning": _learning,
}


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(headings[0], *(Column(heading, justify="right") for heading in headings[1:]))
    for row in rows:
        table.add_row(*row)
    return table


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"

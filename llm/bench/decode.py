"""Decoding speed: our `generate` and Transformers', greedy, on the same weights in the dtype of training's products.

The model first learns to count, until it is sure of each token: on flat logits, rounding would decide which one is likeliest,
and equal tokens would say nothing. A call is timed from prompt to last token; our `Decoding` of the model is made (and
compiled) once, as Transformers' model is.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from llm.bench.implementations import CountingRows, StockpotTraining, build_transformers_model
from llm.bench.timing import interleaved, ratio
from llm.bench.workload import Workload
from llm.device import autocast, has_compiler, resolve_precision
from llm.inference.generate import generate
from llm.inference.timer import GenerationTimer
from llm.models.interface import Decoding, LanguageModel, dtype_of
from llm.training.config import Optimizer, Schedule
from llm.training.distributed.process_group import ProcessGroup

BATCHES = (1, 8)
PROMPT_TOKENS = 32
NEW_TOKENS = 128
UNSEEN = 10**6  # first row of the prompts
# With 29M parameters, 120 lessons of 1024 tokens leave at least 4.8 between the two likeliest tokens; 10k parameters need two
# to four times as many. The rate has to go down: if it is constant, some are as near as 0.1 after 160.
LESSONS = 120
LESSON_TOKENS = 1024
LESSON_SCHEDULE = Schedule(kind="linear", learning_rate=2e-3, warmup_steps=10)
SURE = 3.0  # of logits, where bf16 rounds to 0.1 at most
MOST_TERMS = 4  # of LESSONS each


def measure_decode(
    workload: Workload, model: LanguageModel, *, seconds: float, compiled: bool, group: ProcessGroup
) -> dict[str, Any]:
    """For each batch size: tokens/s of all, and whether all greedy tokens are the same. Teaches `model` before that.

    If `compiled`, one row is decoded with a compiled step as well, where that is possible: on a CPU, with a compiler.
    """
    device = group.device
    precision = resolve_precision(workload.precision, device=device)
    dtype = dtype_of(precision)
    prompt_tokens = min(PROMPT_TOKENS, workload.context // 4)
    new_tokens = min(NEW_TOKENS, workload.context - prompt_tokens)
    margin = teach(workload, model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, group=group)
    model.to(dtype).eval()
    ours, compiling = {"ours": model.decoding()}, 0.0
    if compiled and device.type == "cpu" and has_compiler("cpu"):
        began, ours["ours_compiled"] = time.perf_counter(), model.decoding()
        with torch.inference_mode():
            ours["ours_compiled"].compile()
        compiling = time.perf_counter() - began
    theirs = build_transformers_model(workload, model.state_dict(), dtype=dtype).to(device).eval()
    rows = CountingRows(workload.context, workload.vocab_size)
    prompts = [rows.row(UNSEEN + index).tokens[:prompt_tokens].tolist() for index in range(max(BATCHES))]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "least_margin": margin,  # of logits, between the two likeliest tokens
        "compiling_seconds": compiling,
        "batch": {
            str(batch): _compare(
                {name: decoding for name, decoding in ours.items() if name == "ours" or batch == 1},
                theirs,
                prompts[:batch],
                new_tokens=new_tokens,
                seconds=seconds,
                device=device,
            )
            for batch in BATCHES
        },
    }


def _compare(
    ours: Mapping[str, Decoding],
    theirs: Any,
    prompts: list[list[int]],
    *,
    new_tokens: int,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """Tokens/s of all on one batch of prompts, and how many of ours continue a prompt as theirs does."""
    inputs = torch.tensor(prompts, device=device)

    def our_answers(decoding: Decoding) -> list[list[int]]:
        return generate(decoding, prompts, max_new_tokens=new_tokens, end=(), timer=GenerationTimer())

    def their_answers() -> list[list[int]]:
        answers: list[list[int]] = theirs.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )[:, inputs.shape[1] :].tolist()
        return answers

    calls = {name: partial(our_answers, decoding) for name, decoding in ours.items()}
    expected = their_answers()
    same = {name: sum(map(list.__eq__, answers(), expected)) for name, answers in calls.items()}
    timings = interleaved({**calls, "transformers": their_answers}, seconds=seconds, device=device)
    made = len(prompts) * new_tokens
    found: dict[str, Any] = {
        "transformers": made / timings["transformers"].median,
        "rounds": {name: timing.rounds for name, timing in timings.items()},
    }
    for name in ours:
        found |= {
            name: made / timings[name].median,
            f"{name}_times_as_fast": ratio(timings, "transformers", name),
            f"{name}_same_prompts": same[name],
        }
    return found


def teach(workload: Workload, model: LanguageModel, *, prompt_tokens: int, new_tokens: int, group: ProcessGroup) -> float:
    """Train until the model is sure of each token, or MOST_TERMS are over; returns the least margin of the likeliest token."""
    rows = CountingRows(workload.context, workload.vocab_size)
    unseen = [rows.row(UNSEEN + index).tokens[: prompt_tokens + new_tokens] for index in range(max(BATCHES))]
    tokens = torch.from_numpy(np.stack(unseen)).to(group.device)
    count = max(1, LESSON_TOKENS // workload.context)
    lesson = workload.model_copy(update={"rows": count, "micro_batch": "auto", "compiled": False, "optimizer": Optimizer()})
    margin = 0.0
    for _ in range(MOST_TERMS):
        ours = StockpotTraining(lesson, model, schedule=LESSON_SCHEDULE, steps=LESSONS, group=group)
        for step in range(LESSONS):
            ours.step_on(*ours.load(step))
        model.eval()
        with torch.no_grad(), autocast(ours.runtime.precision, device=group.device):
            likeliest = model(tokens)[:, prompt_tokens - 1 : -1].float().topk(2).values
        margin = float((likeliest[..., 0] - likeliest[..., 1]).min())
        if margin >= SURE:
            break
    return margin

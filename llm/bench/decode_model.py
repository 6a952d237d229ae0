"""Decoding and prefill of a real model: ours, stock Transformers, and llama.cpp from files that are written of it.

All take turns in one process with the same threads, on one text: PROMPT_TOKENS are read and NEW_TOKENS made, greedily, and
PREFILL_TOKENS read for one token. llama.cpp keeps keys and values in fp32 as ours does. The machine may be busy: of each, the
fastest turn counts. At batch 1 a token reads every weight once, so bytes per second say how far the memory is from its limit.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llm.bench.timing import Timings, interleaved
from llm.device import has_compiler
from llm.errors import InputError
from llm.inference.generate import generate
from llm.models.checkpoint import load_checkpoint
from llm.models.interface import Decoding
from llm.tokenizer.tokenizer import TextTokenizer

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 32, 64, 512
GGUF_PRECISIONS = ("bf16", "q8_0")
TEXT = "The lungs take oxygen from the air and give it to the blood, which carries it to every part of the body. " * 40
Call = Callable[[int, int], object]  # (tokens read, tokens made)


def measure_decode_model(folder: Path, *, scratch: Path, seconds: float, compiled: bool, threads: int) -> dict[str, Any]:
    """Tokens/s of decoding and of prefill, of ours (also compiled), Transformers, and llama.cpp where it is installed.

    InputError for a context that is too short.
    """
    tokenizer, device = TextTokenizer.load(folder), torch.device("cpu")
    prompt = [tokenizer.begin, *tokenizer.encode(TEXT)][:PREFILL_TOKENS]
    model = load_checkpoint(folder, dtype=torch.bfloat16, device=device).eval()
    if model.context < PREFILL_TOKENS + NEW_TOKENS:
        raise InputError(f"{folder}: expected a context of at least {PREFILL_TOKENS + NEW_TOKENS}, got {model.context}")
    weight_bytes = sum(weight.nbytes for weight in model.parameters())
    calls: dict[str, Call] = {"ours": partial(_ours, model.decoding(), prompt)}
    if compiled and has_compiler("cpu"):
        decoding = model.decoding()
        with torch.inference_mode():
            decoding.compile()
        calls["ours_compiled"] = partial(_ours, decoding, prompt)
    calls["transformers"] = _transformers(folder, prompt)
    if find_spec("xllamacpp"):
        for precision in GGUF_PRECISIONS:
            calls[f"llama_cpp_{precision}"] = _llama_cpp(
                folder, scratch, precision, prompt, threads=threads, vocab_size=model.vocab_size, ends=tokenizer.ends
            )
    decode = interleaved(
        {name: partial(call, PROMPT_TOKENS, NEW_TOKENS) for name, call in calls.items()}, seconds=seconds, device=device
    )
    prefill = interleaved(
        {name: partial(call, PREFILL_TOKENS, 1) for name, call in calls.items()}, seconds=seconds, device=device
    )
    read = interleaved(
        {name: partial(call, PROMPT_TOKENS, 1) for name, call in calls.items()}, seconds=seconds / 4, device=device
    )
    return {
        "dtype": "bfloat16",
        "threads": threads,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "prefill_tokens": PREFILL_TOKENS,
        "weight_bytes": weight_bytes,
        "candidates": {name: _speeds(decode[name], read[name], prefill[name]) for name in calls},
    }


def _speeds(decode: Timings, read: Timings, prefill: Timings) -> dict[str, Any]:
    made = min(decode.rounds) - min(read.rounds)  # of all new tokens but the first
    return {
        "tokens_per_second": (NEW_TOKENS - 1) / made,
        "prefill_tokens_per_second": PREFILL_TOKENS / min(prefill.rounds),
        "rounds": decode.rounds,
        "prefill_rounds": prefill.rounds,
    }


def _ours(decoding: Decoding, prompt: list[int], read: int, new: int) -> list[list[int]]:
    return generate(decoding, [prompt[:read]], max_new_tokens=new, end=())


def _transformers(folder: Path, prompt: list[int]) -> Call:
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_pretrained
    theirs = make(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    def call(read: int, new: int) -> object:
        inputs = torch.tensor([prompt[:read]])
        return theirs.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, min_new_tokens=new, max_new_tokens=new
        )

    return call


def _llama_cpp(folder: Path, scratch: Path, precision: Any, prompt: list[int], **how: Any) -> Call:
    from llm.export.gguf import write_gguf
    from llm.export.llama_cpp_backend import LlamaCppBackend

    target = scratch / f"{precision}.gguf"
    write_gguf(folder, target, precision=precision)
    backend = LlamaCppBackend(target, name=precision, context=PREFILL_TOKENS + NEW_TOKENS, **how)
    return lambda read, new: backend.written(prompt[:read], count=new)

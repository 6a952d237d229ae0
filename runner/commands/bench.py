"""`run bench [RECIPE]`: speed and memory on this machine."""

import argparse
import json
import signal
from pathlib import Path

from runner.errors import RecipeError
from runner.options import add_cache_option, add_recipe_options, recipe_of, store_of


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    sub.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        metavar="RECIPE",
        help="measures its first pretrain stage, else its first training; else a 28.8M model",
    )
    sub.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a model folder. With --only lora: its fine-tuning beside stock Transformers and PEFT, on the chats of the "
        "RECIPE's first lora stage; with --only decode: decoding and prefill beside Transformers and llama.cpp",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--seconds", type=float, default=10.0, help="per measurement (default: 10), at least three rounds")
    sub.add_argument(
        "--only",
        metavar="WHAT",
        help="some of matmul,train,decode,memory,machinery,labels,processes,lora,head,context, or learning (trains twice)",
    )
    sub.add_argument("--no-compile", action="store_true", help="compile neither our code nor Transformers")
    add_recipe_options(sub)
    add_cache_option(sub)


def main(options: argparse.Namespace) -> int:
    """Measures speed and memory on this machine, compared with stock Transformers."""
    from runner.diagnostics.bench import DECODE, LORA, chosen, measure, model_job, recipe_job, reference_job
    from runner.diagnostics.bench_tables import show

    settings = {"seconds": options.seconds, "compiled": not options.no_compile, "only": chosen(options.only)}
    if options.model is not None:
        if not {*settings["only"]} <= {LORA, DECODE}:
            raise RecipeError("--model: expected --only lora or --only decode beside it, got another choice")
        job = model_job(options.model, recipe_of(options) if options.recipe else None, store_of(options), **settings)
    elif options.recipe is not None:
        job = recipe_job(recipe_of(options), store_of(options), **settings)
    elif options.overrides:
        raise RecipeError("--set: expected a RECIPE to change, got none")
    else:
        job = reference_job(**settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it also ends the worker and removes its folder
    result = measure(job)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show(result)
    return 0

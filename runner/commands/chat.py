"""`run chat RECIPE [STAGE]`: a conversation with a model in the terminal."""

import argparse
import secrets
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from runner.errors import RecipeError
from runner.options import add_recipe_argument, add_remote_option, add_sampling_options, add_stage_argument, plan_of, recipe_of
from runner.serving.models import needed_for, servable_models

if TYPE_CHECKING:
    from llm.inference.chat_session import AnswerOptions, ChatSession

HELP = "/new starts a new conversation, /exit (or Ctrl-D) quits, Ctrl-C stops an answer"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_remote_option(sub)
    add_stage_argument(sub, nargs="?", help="the stage whose model to use (default: the last finished one)")
    sub.add_argument("--system", metavar="TEXT", help="a system message at the start")
    add_sampling_options(sub)


def main(options: argparse.Namespace) -> int:
    """Chats with a finished model in the terminal. In a pipe, each line of the input is a message."""
    recipe = recipe_of(options)
    names = [options.stage] if options.stage else []
    plan = plan_of(options, recipe, needed=lambda plan: needed_for(plan, names))
    (model,) = servable_models(recipe, plan, names)
    from llm.errors import InputError
    from llm.inference.chat_session import AnswerOptions
    from llm.inference.sampling import Sampling
    from runner.serving.reasoning import thinking_fault

    if sys.stdin.isatty():
        print("loading and compiling ..." if options.compile else "loading ...", file=sys.stderr)
    try:
        sampling = Sampling(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k)
        session = model.open(precision=recipe.head.parallel.precision, compiled=options.compile)
    except InputError as error:
        raise RecipeError(f"{model.name}: {error}") from error
    if session.chats and (fault := thinking_fault(session.tokenizer, options.thinking)):
        raise RecipeError(f"--thinking: {model.name}: {fault}")
    if sys.stdin.isatty():
        print(f"{model.name} of {recipe.head.name}; {HELP}", file=sys.stderr)
    asked = AnswerOptions(max_new_tokens=options.max_new_tokens, sampling=sampling)
    _chat(session, asked, system=options.system, seed=options.seed, thinking=options.thinking)
    return 0


def _chat(
    session: "ChatSession", asked: "AnswerOptions", *, system: str | None, seed: int | None, thinking: bool | None
) -> None:
    """Reads messages and prints answers until the end of the input. Without a `seed`, each answer has another."""
    first = [{"role": "system", "content": system}] if system else []
    messages = first
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/new":
            messages = first
        elif sys.stdin.isatty() and line.startswith("/") and line[1:].isalpha():
            print(HELP, file=sys.stderr)
        elif line:
            chat = [*messages, {"role": "user", "content": line}]
            drawn = replace(asked.sampling, seed=secrets.randbits(63) if seed is None else seed)
            answer = _answer(session, chat, replace(asked, sampling=drawn), thinking=thinking)
            if answer is not None:
                messages = [*chat, {"role": "assistant", "content": answer}]


def _answer(
    session: "ChatSession", messages: list[dict[str, str]], options: "AnswerOptions", *, thinking: bool | None
) -> str | None:
    """Prints an answer while it is generated, and returns it; None if there is none. Ctrl-C ends it early."""
    from llm.errors import InputError

    pieces: list[str] = []
    try:
        answer = session.answer(messages, options, thinking=thinking)
        if answer.forgotten:
            print(f"(the first {answer.forgotten} turns no longer fit into the context and are dropped)", file=sys.stderr)
        for piece in answer.pieces:
            pieces.append(piece)
            print(piece, end="", flush=True)
        print(" …" if answer.is_cut else "", flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return None
    except KeyboardInterrupt:
        print(" …", flush=True)
        if not pieces:
            return None
    return "".join(pieces)

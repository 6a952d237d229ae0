"""`run serve RECIPE [STAGE]...`: a web page and an OpenAI-compatible endpoint for finished models."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from runner.errors import RecipeError
from runner.options import add_recipe_argument, add_remote_option, add_sampling_options, add_stage_argument, plan_of, recipe_of
from runner.serving.models import needed_for, servable_models

SHORTEST_KEY = 16  # characters
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_argument(sub)
    add_remote_option(sub)
    add_stage_argument(
        sub,
        "stages",
        nargs="*",
        help="stages whose models to serve, side by side on the page (default: the last finished one)",
    )
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond loopback, other machines can connect")
    sub.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which requests may call this machine",
    )
    sub.add_argument("--port", type=int, default=8000, help="port (default: 8000; 0 takes a free one)")
    sub.add_argument("--queue", type=int, default=16, metavar="N", help="requests that may wait (default: 16)")
    add_sampling_options(sub)


def _hosts(host: str, more: Sequence[str]) -> Iterator[str]:
    """The names by which requests may call the server: a page of a stranger calls it by a name of the stranger."""
    import socket

    yield from ("127.0.0.1", "localhost", "[::1]", *more)
    if host in LOOPBACK:
        return
    import psutil

    addresses = [one.address.partition("%")[0] for found in psutil.net_if_addrs().values() for one in found]
    for name in dict.fromkeys([host, socket.gethostname(), socket.getfqdn(), *addresses]):
        yield f"[{name}]" if ":" in name else name


def main(options: argparse.Namespace) -> int:
    """Serves finished models: a chat page, and /v1/chat/completions, /v1/completions, /v1/models."""
    recipe = recipe_of(options)
    plan = plan_of(options, recipe, needed=lambda plan: needed_for(plan, options.stages))
    found = servable_models(recipe, plan, options.stages)
    key = os.environ.get("STOCKPOT_API_KEY", "").strip()
    if options.host not in LOOPBACK and len(key) < SHORTEST_KEY:
        raise RecipeError(
            f"--host {options.host}: expected STOCKPOT_API_KEY with at least {SHORTEST_KEY} characters, since other machines "
            f"can connect, got {'one with ' + str(len(key)) if key else 'none'}; `openssl rand -hex 32` makes one"
        )
    if options.queue < 0:
        raise RecipeError(f"--queue: expected at least 0, got {options.queue}")
    import socket

    import uvicorn

    from llm.errors import InputError
    from llm.inference.sampling import Sampling
    from runner.serving.reasoning import thinking_fault
    from runner.serving.samples import sample_prompts
    from runner.serving.server import Server, ServerConfig

    listening = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((options.host, options.port))  # before the models are loaded
    except OSError as error:
        raise RecipeError(f"--host {options.host} --port {options.port}: cannot listen there ({error.strerror})") from error
    try:
        sampling = Sampling(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k)
        how = {"precision": recipe.head.parallel.precision, "compiled": options.compile}
        models = {model.name: model.open(**how) for model in found}
    except InputError as error:
        raise RecipeError(str(error)) from error
    for name, session in models.items():
        if session.chats and (fault := thinking_fault(session.tokenizer, options.thinking)):
            raise RecipeError(f"--thinking: {name}: {fault}")
    config = ServerConfig(
        sampling=sampling,
        thinking=options.thinking,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        queue=options.queue,
        api_key=key or None,
        hosts=tuple(_hosts(options.host, options.allow_host)),
        samples=tuple(sample_prompts(recipe)),
    )
    address = f"[{options.host}]" if ":" in options.host else options.host
    print(
        f"{', '.join(models)} at http://{address}:{listening.getsockname()[1]} (Ctrl-C stops the server)",
        file=sys.stderr,
        flush=True,
    )
    server = uvicorn.Server(uvicorn.Config(Server(models, config).app(), log_level="warning", lifespan="off"))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
        server.run(sockets=[listening])
    return 0

"""`run engine`: where processes run: the engine, its nodes and GPUs, and why jobs wait."""

import argparse

from runner.options import add_engine_option


def add_options(sub: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_engine_option(sub)


def main(options: argparse.Namespace) -> int:
    """Shows the engine of runs: who chose it, its nodes and GPUs, and why your jobs wait."""
    from runner.engine.choice import chosen_kind, engine_of
    from runner.engine.settings import read_settings
    from runner.planning.text_table import text_table

    kind, place = chosen_kind(options.engine, read_settings())
    capacity = engine_of(options.engine).capacity()
    print(f"engine {kind} (by {place})")
    rows = [("node", "state", "cores", "GPUs")]
    rows += [(node.name, node.state, str(node.cores), str(node.gpus)) for node in capacity.nodes]
    print(*text_table(rows), sep="\n")
    for job in capacity.waiting:
        print(f"waits: {job}")
    return 0

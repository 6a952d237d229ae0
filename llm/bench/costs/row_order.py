"""What the order of rows is worth: the same training on rows that are shuffled, and on rows as they follow each other in
documents.

    python -m llm.bench.costs.row_order
    python -m llm.bench.costs.row_order --tokens "$(run path recipes/bilingual-chat.toml tokens)" --steps 700

By itself it makes up text: a Markov chain per document, with the transitions of one of a few topics, and documents that are
longer than a step. With `--tokens` it takes the result of a `pack` stage. Both trainings have equal settings and documents in
equal order, and are measured on the same held-out rows, as a whole and by source.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.data.token_rows import TokenRows
from llm.data.token_shards import TokenWriter
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.training.config import Budget, Optimizer, Schedule
from llm.training.loss import next_token_loss
from llm.training.task import CheckpointConfig, ComputeConfig, TrainingTask
from llm.training.trainer import train
from llm.training.validation import Validation

VOCABULARY, TOPICS, BRANCHES = 64, 4, 4  # tokens; tables of transitions; tokens that may follow a token in a topic
DOCUMENTS, DOCUMENT_TOKENS = 16, 12_500  # a document is six steps
MADE_UP: dict[str, Any] = {
    "sizes": {"hidden_size": 48, "layers": 2, "heads": 4, "context": 64},
    "schedule": Schedule(learning_rate=1e-2, warmup_steps=20),
    "optimizer": Optimizer(),
}
PACKED: dict[str, Any] = {  # as the shipped recipes train
    "sizes": {"hidden_size": 192, "layers": 4, "heads": 3},
    "schedule": Schedule(kind="wsd", learning_rate=2e-2, warmup_steps=50, decay_fraction=0.4),
    "optimizer": Optimizer(kind="muon", muon_learning_rate=0.02, beta2=0.99),
}
BATCH_TOKENS = 2048


def main() -> None:
    """Train twice and print the held-out losses."""
    parser = argparse.ArgumentParser(prog="python -m llm.bench.costs.row_order")
    parser.add_argument("--tokens", type=Path, help="the folder that a pack stage made; default: made-up text")
    parser.add_argument("--steps", type=int, help=f"steps of {BATCH_TOKENS:,} tokens; default: one epoch")
    options = parser.parse_args()
    budget = Budget(epochs=1) if options.steps is None else Budget(steps=options.steps)
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as scratch:
        folder = options.tokens or _made_up(Path(scratch, "tokens"))
        for name, in_order in (("as they follow each other", True), ("shuffled", False)):
            settings = MADE_UP if options.tokens is None else PACKED
            metrics = _train(folder, budget, Path(scratch, name), in_order=in_order, **settings)
            print(f"rows {name}: {_shown(metrics)}", flush=True)
    if options.tokens is None:
        print(f"the least possible, once the topic is known: {math.log(BRANCHES):.3f}")


def _shown(metrics: dict[str, Any]) -> str:
    """The held-out losses of a training, as a whole and by source, in nats per token and bits per byte."""
    kinds = {"validation_loss": "nats per held-out token", "validation_bits_per_byte": "bits per byte"}
    shown = []
    for field, unit in kinds.items():
        parts = [
            f"{name.partition('/')[2]} {value:.3f}" for name, value in sorted(metrics.items()) if name.startswith(f"{field}/")
        ]
        shown.append(f"{metrics[field]:.3f} {unit}" + (f" ({', '.join(parts)})" if parts else ""))
    return "; ".join(shown)


def _made_up(folder: Path) -> Path:
    random = np.random.default_rng(0)
    tables = random.integers(VOCABULARY, size=(TOPICS, VOCABULARY, BRANCHES))
    for name, documents, tokens in (("train", DOCUMENTS, DOCUMENT_TOKENS), ("validation", TOPICS, 2_000)):
        with TokenWriter(folder / name, vocab_size=VOCABULARY, context=64, padding=0) as writer:
            for number in range(documents):
                table, ids = tables[number % TOPICS], [int(random.integers(VOCABULARY))]
                for branch in random.integers(BRANCHES, size=tokens - 1).tolist():
                    ids.append(int(table[ids[-1], branch]))
                writer.append(ids, passes=1, text_bytes=tokens)
            writer.finish()
    return folder


def _train(
    folder: Path,
    budget: Budget,
    scratch: Path,
    *,
    in_order: bool,
    sizes: dict[str, int],
    schedule: Schedule,
    optimizer: Optimizer,
) -> dict[str, Any]:
    torch.manual_seed(0)
    rows, held_out = TokenRows(folder / "train", seed=1, in_order=in_order), TokenRows(folder / "validation", seed=None)
    scratch.mkdir()
    task = TrainingTask(next_token_loss, rows, budget, BATCH_TOKENS, schedule=schedule, optimizer=optimizer, seed=0)
    return train(
        Decoder(DecoderConfig.model_validate({"context": rows.context} | sizes), vocab_size=rows.shards.vocab_size),
        task,
        compute=ComputeConfig(cores=torch.get_num_threads(), precision="fp32", compiled=False, fused_attention=False),
        checkpoints=CheckpointConfig(scratch),
        validation=Validation(held_out, sources=held_out.sources),
        report=lambda **values: None,
        should_stop=lambda: False,
    )


if __name__ == "__main__":
    main()

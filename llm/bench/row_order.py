"""What the order of rows is worth: the same training on rows that are shuffled, and on rows as they lie in long documents.

    python -m llm.bench.row_order

The text is made up: a Markov chain per document, with the transitions of one of a few topics, and documents that are longer
than a step. Both trainings see every row once, with equal settings and documents in equal order, and are measured on held-out
documents of all topics.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from llm.data.token_rows import TokenRows
from llm.data.token_shards import TokenWriter
from llm.models.llama.config import LlamaConfig
from llm.models.llama.model import Llama
from llm.training.config import Budget, Optimizer, Schedule
from llm.training.loss import next_token_loss
from llm.training.task import CheckpointConfig, ComputeConfig, TrainingTask
from llm.training.trainer import train
from llm.training.validation import Validation

VOCABULARY, TOPICS, BRANCHES = 64, 4, 4  # tokens; tables of transitions; tokens that may follow a token in a topic
DOCUMENTS, DOCUMENT_TOKENS = 16, 12_500
CONTEXT, ROWS = 64, 32  # of a step, so a document is six of them
SIZES = {"hidden_size": 48, "layers": 2, "heads": 4, "context": CONTEXT}


def main() -> None:
    """Train twice and print the held-out losses."""
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as folder:
        random = np.random.default_rng(0)
        tables = random.integers(VOCABULARY, size=(TOPICS, VOCABULARY, BRANCHES))
        for name, documents, tokens in (("train", DOCUMENTS, DOCUMENT_TOKENS), ("held-out", TOPICS, 2_000)):
            _write(Path(folder, name), tables, documents, tokens, random=random)
        for name, seed in (("as they lie", None), ("shuffled", 1)):
            loss = _held_out_loss(Path(folder), seed=seed)
            print(f"rows {name}: {loss:.3f} nats per held-out token, after one epoch", flush=True)
        print(f"the least possible, once the topic is known: {np.log(BRANCHES):.3f}")


def _write(folder: Path, tables: np.ndarray, documents: int, tokens: int, *, random: np.random.Generator) -> None:
    with TokenWriter(folder, vocab_size=VOCABULARY, context=CONTEXT, padding=0) as writer:
        for number in range(documents):
            table, ids = tables[number % TOPICS], [int(random.integers(VOCABULARY))]
            for branch in random.integers(BRANCHES, size=tokens - 1).tolist():
                ids.append(int(table[ids[-1], branch]))
            writer.append(ids, passes=1, text_bytes=tokens)
        writer.finish()


def _held_out_loss(folder: Path, *, seed: int | None) -> float:
    torch.manual_seed(0)
    task = TrainingTask(
        next_token_loss,
        TokenRows(folder / "train", seed=seed),  # without a seed, rows come as they lie
        Budget(epochs=1),
        CONTEXT * ROWS,
        schedule=Schedule(learning_rate=1e-2, warmup_steps=20),
        optimizer=Optimizer(),
        seed=0,
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        metrics = train(
            Llama(LlamaConfig.model_validate(SIZES), vocab_size=VOCABULARY),
            task,
            compute=ComputeConfig(cores=2, precision="fp32", compiled=False, fused_attention=False),
            checkpoints=CheckpointConfig(Path(scratch)),
            validation=Validation(TokenRows(folder / "held-out", seed=None)),
            report=lambda **values: None,
            should_stop=lambda: False,
        )
    return float(metrics["validation_loss"])


if __name__ == "__main__":
    main()

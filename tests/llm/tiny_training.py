"""A training of seconds on made-up rows: run by tests in their own process, or by `accelerate launch` in several."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.models.llama.config import LlamaConfig
from llm.models.llama.model import Llama
from llm.objectives import next_token_loss
from llm.rows import IGNORE, Row
from llm.settings import Budget, Optimizer, Schedule
from llm.train import train
from llm.validation import Validation

VOCABULARY = 40


@dataclass(frozen=True)
class MadeUpRows:
    """Counting modulo a number, in documents of changing length, with a changing share of targets."""

    context: int = 24
    rows_per_epoch: int = 64
    seed: int = 0

    def row(self, index: int) -> Row:
        random = np.random.default_rng([self.seed, index])
        border = int(random.integers(4, self.context - 4))
        documents = (np.arange(self.context) >= border).astype(np.int32)
        stride = random.integers(1, 4, size=2)[documents]
        tokens = (np.arange(self.context) * stride + random.integers(VOCABULARY)) % VOCABULARY
        targets = np.append(tokens[1:], IGNORE)
        targets[border - 1] = IGNORE
        targets[: int(random.integers(self.context - 3))] = IGNORE  # as in a chat: the prompt is not learned
        return Row(tokens.astype(np.int64), targets.astype(np.int64), documents)


def tiny_model(**changes: Any) -> Llama:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 24}
    return Llama(LlamaConfig.model_validate(sizes | changes), vocab_size=VOCABULARY)


def tiny_training(model: Llama, scratch: Path, *, lines: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """Train `model`; what is reported goes to `lines`."""
    reported: list[dict[str, Any]] = [] if lines is None else lines
    settings: dict[str, Any] = {
        "objective": next_token_loss,
        "rows": MadeUpRows(),
        "validation": Validation(MadeUpRows(rows_per_epoch=6, seed=9), bytes_per_token=3.0),
        "budget": Budget(steps=20),
        "batch_tokens": 5 * 24,
        "schedule": Schedule(learning_rate=1e-2, warmup_steps=3),
        "optimizer": Optimizer(),
        "seed": 7,
        "check": False,
        "validate_every": 8,
        "checkpoint_every": None,
        "checkpoint_minutes": None,
        "micro_batch": "auto",
        "precision": "fp32",
        "compiled": False,
        "strategy": "ddp",
        "find_unused_parameters": False,
        "cores": 1,
        "scratch": scratch,
        "report": lambda **values: reported.append(values),
        "should_stop": lambda: False,
    } | changes
    return train(model, settings.pop("objective"), **settings)


def main() -> None:
    """Train in this group of processes; the first leaves metrics and reports in the folder that the command line names."""
    folder = Path(sys.argv[1])
    lines: list[dict[str, Any]] = []
    metrics = tiny_training(tiny_model(dropout=0.1), folder, lines=lines, micro_batch=2)
    if metrics["choices"]["processes"] > 1 and torch.distributed.get_rank() > 0:
        return
    (folder / "result.json").write_text(json.dumps({"metrics": metrics, "lines": lines}))


if __name__ == "__main__":
    main()

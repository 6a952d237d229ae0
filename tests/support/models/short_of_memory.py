"""A training of seconds in one of two processes on machines that share no disk: in the second, the allocator refuses
memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tiny_training import tiny_model, tiny_training
from torch import Tensor

from llm.data.batch import Batch
from llm.training.config import Budget
from llm.training.loss import next_token_loss
from llm.training.runtime import limit_memory
from runner.engine.launch import free_port

ROWS = 4  # of a step: two for each process
STEPS = 6
FORWARDS = 2  # of a process before the first step: of one row, and of a micro-batch


class Refused(torch.autograd.Function):
    """Its backward pass asks for more memory than any machine has."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        torch.empty(2**60, dtype=torch.uint8)
        return grad


def objective_of(case: dict[str, Any]) -> Any:
    """The loss of the next token; in the second process memory runs out in the pass, and from the call on, that `case` says,
    where a batch has more than one row."""
    calls: list[bool] = []

    def objective(model: Any, batch: Batch) -> tuple[Tensor, ...]:
        calls.append(model.training)
        total, *rest = next_token_loss(model, batch)
        if os.environ.get("RANK") != "1" or len(batch.rows) == 1 or len(calls) <= case.get("from", 0):
            return total, *rest
        if case["runs_out"] == "validation" and model.training:
            return total, *rest
        if case["runs_out"] == "backward":
            return Refused.apply(total), *rest  # type: ignore[no-untyped-call]
        torch.empty(2**60, dtype=torch.uint8)
        return total, *rest

    return objective


def run(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train as `case` says, in the scratch folder of this process alone."""
    lines: list[dict[str, Any]] = []
    if "limit" in case:
        limit_memory(folder, case["limit"])
    changes = {name: case[name] for name in ("strategy", "find_unused_parameters", "every", "micro_batch") if name in case}
    changes |= {"objective": objective_of(case)} if "runs_out" in case else {}
    if case.get("runs_out") != "validation":
        changes["validation"] = None
    model = tiny_model()
    rows = case.get("rows", ROWS)
    settings = {"micro_batch": "auto", "budget": Budget(steps=STEPS), "batch_tokens": rows * 24, "timeout_minutes": 1.0}
    metrics = tiny_training(model, folder, lines=lines, **settings | changes)
    digest = float(sum(weight.detach().double().sum() for weight in model.parameters()))
    return {"metrics": metrics, "lines": lines, "weights": digest}


def on_two_machines(folder: Path, cases: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str], float]:
    """What both processes found, by case; the last lines of their errors; and seconds from the first end to the last.

    Nothing but themselves ends one when the other fails.
    """
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"ACCELERATE_USE_CPU": "true", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, __file__, str(folder), json.dumps(cases)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = [folder / f"{rank}.json" for rank in range(2)]
    errors = [(folder / f"{rank}.log").read_text().strip() for rank in range(2)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in found], errors, float(done.stdout)


def main() -> None:
    """Two processes, each with a folder of its own; prints the seconds from the first end to the last."""
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for rank in range(2):
        if os.fork() == 0:
            os.environ["RANK"] = str(rank)
            (folder / f"{rank}.json").unlink(missing_ok=True)
            with (folder / f"{rank}.log").open("w") as log:
                os.dup2(log.fileno(), sys.stderr.fileno())
            (folder / f"{rank}.json").write_text(json.dumps(work(folder / str(rank), cases)))
            return
    os.wait()
    began = time.monotonic()
    os.wait()
    print(time.monotonic() - began)


def work(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Case after case; a process that fails in a case that `lingers` stays for as long, as one that cleans up."""
    found = {}
    for name, case in cases.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            found[name] = run(folder / name, case)
        except Exception:
            time.sleep(case.get("lingers", 0.0) if os.environ["RANK"] == "1" else 0.0)
            raise
    return found


if __name__ == "__main__":
    main()

"""One process of a group that works in batches, case after case: run by tests, once for each rank."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from llm.errors import InputError
from llm.inference.batches import work_in_batches
from llm.inference.processes import Processes, join
from llm.inference.timer import GenerationTimer

BATCHES = [[4, 0], [1, 5], [3], [2, 6], [7]]


def case(processes: Processes, *, failing: int | None) -> dict[str, Any]:
    """What this process finds, if that of rank `failing` cannot do its second batch."""
    worked: list[list[int]] = []

    def work(batch: list[int], timer: GenerationTimer) -> list[int]:
        worked.append(batch)
        if processes.rank == failing and len(worked) == 2:
            raise InputError(f"rows.jsonl:{batch[0]}: expected a label, got none")
        timer.new_tokens += len(batch)
        return [100 + index for index in batch]

    timer, done = GenerationTimer(), list[int]()
    try:
        found = work_in_batches(
            BATCHES, work, processes=processes, timer=timer, progress=lambda rows, total: done.append(rows)
        )
    except InputError as error:
        return {"error": str(error), "worked": worked}
    alone = processes.by_main(lambda: f"by {processes.rank}")
    return {"found": sorted(found.items()), "tokens": timer.new_tokens, "done": done, "worked": worked, "alone": alone}


def main() -> None:
    processes, _ = join()
    cases = {"none": None, "first": 0, "second": 1}
    found = {name: case(processes, failing=failing) for name, failing in cases.items()}
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

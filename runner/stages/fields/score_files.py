"""The files of scores, and the part of them that a record keeps."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runner.artifacts import Scores
from runner.files import write_whole
from runner.gates import DEFAULT_CONFIDENCE, interval

if TYPE_CHECKING:
    from llm.evaluation.scoring import Outcome


def write_scores(artifact: Scores, outcomes: "Mapping[str, Outcome]") -> dict[str, Any]:
    """Write the outcome of each task, by its name; returns the metrics for the record."""
    replicates = {f"{name}.{score}": values for name, one in outcomes.items() for score, values in one.replicates.items()}
    result: dict[str, dict[str, Any]] = {
        "scores": {f"{name}.{metric}": value for name, one in outcomes.items() for metric, value in one.scores.items()},
        "intervals": {
            score: [float(f"{end:.4g}") for end in interval(values, DEFAULT_CONFIDENCE)]
            for score, values in replicates.items()
        },
        "counts": {name: one.rows for name, one in outcomes.items()},
    }
    examples = [{"task": name, **example} for name, one in outcomes.items() for example in one.examples]
    write_whole(artifact.scores, json.dumps(result, indent=2, sort_keys=True) + "\n")
    write_whole(artifact.errors, "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
    write_whole(artifact.values, json.dumps({name: one.values for name, one in outcomes.items()}) + "\n")
    return {
        "scores": result["scores"],
        "intervals": result["intervals"],
        "tasks": {name: {"rows": one.rows, **one.facts} for name, one in outcomes.items()},
        # As text, since people read the record too, and lists would be many lines.
        "replicates": {score: " ".join(map(str, values)) for score, values in replicates.items()},
    }

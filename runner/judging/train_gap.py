"""The gap between the loss on held-out rows and that on rows just learned, from the records of trainings."""

from collections.abc import Callable, Mapping, Sequence

from runner.graph import ancestors
from runner.judging.gates import TRAIN_GAP
from runner.stage import Lineage, Metrics


def last_trainings(model: str, inputs: Mapping[str, Sequence[str]], trains: Callable[[str], bool]) -> list[str]:
    """The trainings behind a model (or the model's own) on whose result no other of them builds."""
    found = [name for name in (model, *ancestors(inputs, model)) if trains(name)]
    earlier = {source for name in found for source in ancestors(inputs, name)}
    return sorted({*found} - earlier)


def train_gap(model: str, lineage: Lineage) -> dict[str, float]:
    """By how much the loss on held-out rows is above the one in the last steps of training; the largest of several trainings,
    and nothing where none tells both.
    """

    def told(name: str) -> Metrics:
        metrics: Metrics = lineage.records[name]["metrics"] if name in lineage.records else {}
        return metrics

    trainings = last_trainings(model, lineage.inputs, lambda name: "trained_parameters" in told(name))
    gaps = [
        told(name)["validation_loss"] - told(name)["loss"]
        for name in trainings
        if told(name).get("validation_loss") is not None and told(name).get("loss") is not None
    ]
    return {TRAIN_GAP: max(gaps)} if gaps else {}

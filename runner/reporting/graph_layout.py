"""The layout of a layered graph drawing (Sugiyama et al. 1981): no arrow runs behind a box, and few arrows cross.

An arrow that spans several columns has a lane in each column between, beside the boxes there; arrows from one source share
their lanes. This is only about positions; `runner.reporting.graph_drawing` draws.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SWEEPS = 12  # over all columns, in alternating directions

Lane = tuple[str, int]  # source of its arrows, and column
Node = str | Lane


@dataclass(frozen=True)
class Layers:
    """The column of each box, and the vertical centre of each box and lane, from 0 downwards."""

    column: Mapping[str, int]
    middle: Mapping[Node, float]

    def route(self, source: str, target: str) -> list[tuple[int, float]]:
        """Column and vertical centre of the lanes of an arrow."""
        between = range(self.column[source] + 1, self.column[target])
        return [(column, self.middle[source, column]) for column in between]


def columns(sources: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The length of the longest path to each box; `sources` are in topological order."""
    column: dict[str, int] = {}
    for name, read in sources.items():
        column[name] = max((column[source] + 1 for source in read), default=0)
    return column


def layered(sources: Mapping[str, Sequence[str]], *, box: float, lane: float, gap: float) -> Layers:
    """Positions for boxes of height `box` and lanes of height `lane`, `gap` apart; `sources` are in topological order."""
    column = columns(sources)
    layers: list[list[Node]] = [[] for _ in range(max(column.values()) + 1)]
    for name, number in column.items():
        layers[number].append(name)
    links: dict[tuple[Node, Node], None] = {}  # between adjacent columns
    for name, read in sources.items():
        for source in read:
            before: Node = source
            for number in range(column[source] + 1, column[name]):
                here: Lane = (source, number)
                if here not in layers[number]:
                    layers[number].append(here)
                links[before, here] = None
                before = here
            links[before, name] = None
    back: dict[Node, list[Node]] = {node: [] for layer in layers for node in layer}
    ahead: dict[Node, list[Node]] = {node: [] for layer in layers for node in layer}
    for left, right in links:
        back[right].append(left)
        ahead[left].append(right)
    layers = _ordered(layers, back, ahead)
    high = {node: box if isinstance(node, str) else lane for layer in layers for node in layer}
    middle = _middles(layers, back, ahead, high, gap)
    top = min(middle[node] - high[node] / 2 for node in middle)
    return Layers(column, {node: value - top for node, value in middle.items()})


def _ordered(
    layers: list[list[Node]], back: Mapping[Node, Sequence[Node]], ahead: Mapping[Node, Sequence[Node]]
) -> list[list[Node]]:
    """Columns in the order with the fewest crossings found, by sorting nodes by the mean position of their neighbours."""
    best, fewest = layers, _crossings(layers, ahead)
    for sweep in range(SWEEPS):
        layers = [list(layer) for layer in layers]
        forth = sweep % 2 == 0
        numbers = range(1, len(layers)) if forth else range(len(layers) - 2, -1, -1)
        for number in numbers:
            neighbours, beside = (back, layers[number - 1]) if forth else (ahead, layers[number + 1])
            place = {node: float(index) for index, node in enumerate(beside)}
            means = {
                node: _mean([place[other] for other in neighbours[node]], float(index))
                for index, node in enumerate(layers[number])
            }
            layers[number].sort(key=means.__getitem__)
        if (found := _crossings(layers, ahead)) < fewest:
            best, fewest = layers, found
    return best


def _crossings(layers: Sequence[Sequence[Node]], ahead: Mapping[Node, Sequence[Node]]) -> int:
    """The number of pairs of links that cross."""
    found = 0
    for layer, beside in itertools.pairwise(layers):
        place = {node: index for index, node in enumerate(beside)}
        ends = [sorted(place[other] for other in ahead[node]) for node in layer]
        found += sum(
            low > high for index, above in enumerate(ends) for low in above for below in ends[index + 1 :] for high in below
        )
    return found


def _middles(
    layers: Sequence[Sequence[Node]],
    back: Mapping[Node, Sequence[Node]],
    ahead: Mapping[Node, Sequence[Node]],
    high: Mapping[Node, float],
    gap: float,
) -> dict[Node, float]:
    """Vertical centres, as close to the mean of each node's neighbours as the order and the gaps allow."""
    middle: dict[Node, float] = {node: 0.0 for layer in layers for node in layer}
    for sweep in range(SWEEPS):
        order = layers if sweep % 2 == 0 else layers[::-1]
        for layer in order:
            around = {node: [*back[node], *ahead[node]] if sweep else back[node] for node in layer}
            wanted = [_mean([middle[other] for other in around[node]], middle[node]) for node in layer]
            steps = [(high[above] + high[below]) / 2 + gap for above, below in itertools.pairwise(layer)]  # between centres
            middle |= zip(layer, apart(wanted, steps), strict=True)
    return middle


def apart(wanted: Sequence[float], steps: Sequence[float]) -> list[float]:
    """The values closest to `wanted` in least squares, such that each exceeds the one before by at least its step.

    Without the steps it is isotonic regression, by pooling adjacent violators (Ayer et al. 1955).
    """
    offsets = [0.0]
    for step in steps:
        offsets.append(offsets[-1] + step)
    pools: list[tuple[float, int]] = []  # mean and number of values
    for value, offset in zip(wanted, offsets, strict=False):
        mean, size = value - offset, 1
        while pools and pools[-1][0] > mean:
            before, number = pools.pop()
            mean, size = (mean * size + before * number) / (size + number), size + number
        pools.append((mean, size))
    levels = [mean for mean, size in pools for _ in range(size)]
    return [level + offset for level, offset in zip(levels, offsets, strict=False)]


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise

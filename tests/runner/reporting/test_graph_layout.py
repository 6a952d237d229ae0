"""The layout of a layered drawing: nothing overlaps in any graph, and few arrows cross."""

import itertools
import random

import pytest

from runner.reporting.graph_layout import Layers, apart, layered

BOX, LANE, GAP = 50.0, 2.0, 10.0


def placed(sources: dict[str, list[str]]) -> Layers:
    return layered(sources, box=BOX, lane=LANE, gap=GAP)


def random_graph(seed: int) -> dict[str, list[str]]:
    draw = random.Random(seed)
    names = [f"s{index}" for index in range(draw.randint(1, 14))]
    return {name: draw.sample(names[:index], draw.randint(0, min(index, 4))) for index, name in enumerate(names)}


@pytest.mark.parametrize("seed", range(40))
def test_boxes_and_lanes_of_a_column_do_not_overlap(seed: int) -> None:
    sources = random_graph(seed)
    layers = placed(sources)
    for name, read in sources.items():
        for source in read:
            assert layers.column[source] < layers.column[name]
            assert [column for column, _ in layers.route(source, name)] == list(
                range(layers.column[source] + 1, layers.column[name])
            ), "an arrow has a lane through every column between"
    columns: dict[int, list[tuple[float, float]]] = {}
    for node, middle in layers.middle.items():
        column, high = (layers.column[node], BOX) if isinstance(node, str) else (node[1], LANE)
        columns.setdefault(column, []).append((middle, high))
    for nodes in columns.values():
        for (above, high), (below, low) in itertools.pairwise(sorted(nodes)):
            assert below - above >= (high + low) / 2 + GAP - 1e-6
    assert min(middle - high / 2 for nodes in columns.values() for middle, high in nodes) == pytest.approx(0.0)


def test_a_chain_is_straight_and_its_shortcut_goes_around_it() -> None:
    layers = placed({"a": [], "b": ["a"], "c": ["b"], "d": ["a", "c"]})
    assert layers.middle["b"] == pytest.approx(layers.middle["c"], abs=BOX)
    assert all(
        abs(height - layers.middle[box]) > BOX / 2 for (_, height), box in zip(layers.route("a", "d"), "bc", strict=True)
    )


def test_arrows_that_need_not_cross_do_not() -> None:
    layers = placed({"a": [], "b": [], "x": ["b"], "y": ["a"]})
    assert (layers.middle["a"] < layers.middle["b"]) == (layers.middle["y"] < layers.middle["x"])


@pytest.mark.parametrize(
    ("wanted", "steps", "found"),
    [
        ([0.0, 10.0], [5.0], [0.0, 10.0]),  # far enough apart already
        ([0.0, 0.0], [4.0], [-2.0, 2.0]),  # both move by the same distance
        ([5.0, 0.0, 0.0], [1.0, 1.0], [2 / 3, 5 / 3, 8 / 3]),  # the mean stays
    ],
)
def test_values_that_are_too_close_move_as_little_as_possible(
    wanted: list[float], steps: list[float], found: list[float]
) -> None:
    assert apart(wanted, steps) == pytest.approx(found)

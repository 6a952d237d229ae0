"""The graph of a plan as a drawing: text for terminals, Mermaid for Markdown, SVG for everything else."""

from collections.abc import Mapping, Sequence
from typing import Literal
from xml.sax.saxutils import escape

from runner.plan import Entry, Plan

Form = Literal["text", "mermaid", "svg"]
MARKS = {"cached": "✓", "run": "▶", "resume": "↻", "waiting": "·", "push": "↑", "skipped": "–", "failed": "✗", "paused": "‖"}
COLOURS = {  # fill and border by state, from the palette of Okabe and Ito, which colour-blind people can tell apart
    "cached": ("#e3f2ec", "#009e73"),
    "run": ("#e0eef8", "#0072b2"),
    "resume": ("#e0eef8", "#56b4e9"),
    "push": ("#fdf3d8", "#e69f00"),
    "failed": ("#fbe6da", "#d55e00"),
    "paused": ("#fdf3d8", "#e69f00"),
}
OTHER = ("#f3f3f3", "#8a8a8a")
WIDTH, HEIGHT, ACROSS, DOWN, MARGIN = 148, 44, 44, 26, 16  # of a box and between boxes, in pixels


def draw(plan: Plan, form: Form) -> str:
    """The graph of a plan, an arrow from each stage to those that read it."""
    return {"text": as_text, "mermaid": as_mermaid, "svg": as_svg}[form](plan)


def as_text(plan: Plan) -> str:
    """A line per stage, indented by how many stages lie before it at most, with what it reads."""
    column = _columns(plan)
    lines = []
    for entry in plan:
        sources = plan.inputs(entry.name)
        reads = f"  <- {', '.join(sources)}" if sources else ""
        lines.append(
            f"{'  ' * column[entry.name]}{MARKS[entry.state]} {entry.name} ({entry.stage.kind}, {entry.state}){reads}"
        )
    return "\n".join(lines) + "\n"


def as_mermaid(plan: Plan) -> str:
    """A flowchart that GitHub, GitLab and the Hub draw where Markdown holds it in a block marked `mermaid`."""
    number = {entry.name: f"s{index}" for index, entry in enumerate(plan)}
    lines = ["flowchart LR"]
    lines += [f'  {number[entry.name]}["{entry.name}<br/>{entry.stage.kind}: {entry.state}"]' for entry in plan]
    lines += [f"  {number[source]} --> {number[entry.name]}" for entry in plan for source in plan.inputs(entry.name)]
    for state in dict.fromkeys(entry.state for entry in plan):
        fill, border = COLOURS.get(state, OTHER)
        members = ",".join(number[entry.name] for entry in plan if entry.state == state)
        lines += [f"  classDef {state} fill:{fill},stroke:{border},color:#222", f"  class {members} {state}"]
    return "\n".join(lines) + "\n"


def as_svg(plan: Plan) -> str:
    """A picture in layers from left to right, which stands alone and can be put into a page as it is."""
    place = _places(plan)
    wide = MARGIN * 2 + max(x for x, _ in place.values()) + WIDTH
    high = MARGIN * 2 + max(y for _, y in place.values()) + HEIGHT
    arrows = [_arrow(place[source], place[entry.name]) for entry in plan for source in plan.inputs(entry.name)]
    boxes = [_box(entry, *place[entry.name]) for entry in plan]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
            'role="img" aria-label="stages of the recipe" font-family="system-ui, sans-serif">',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>',
            f'<g transform="translate({MARGIN} {MARGIN})">',
            *arrows,
            *boxes,
            "</g></svg>\n",
        ]
    )


def _columns(plan: Plan) -> dict[str, int]:
    """How many stages lie before each at most."""
    column: dict[str, int] = {}
    for entry in plan:  # in topological order
        column[entry.name] = max((column[source] + 1 for source in plan.inputs(entry.name)), default=0)
    return column


def _places(plan: Plan) -> Mapping[str, tuple[int, int]]:
    """The upper left corner of each box. In its layer a stage stands at the mean height of what it reads (Sugiyama 1981)."""
    column = _columns(plan)
    layers: list[list[str]] = [[] for _ in range(max(column.values()) + 1)]
    for name, number in column.items():
        layers[number].append(name)
    row: dict[str, float] = {}
    for layer in layers:
        layer.sort(key=lambda name: _mean([row[source] for source in plan.inputs(name)]))
        row |= {name: float(index) for index, name in enumerate(layer)}
    most = max(len(layer) for layer in layers)
    step = HEIGHT + DOWN
    return {
        name: (column[name] * (WIDTH + ACROSS), round((row[name] + (most - len(layers[column[name]])) / 2) * step))
        for name in column
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _arrow(source: tuple[int, int], target: tuple[int, int]) -> str:
    x, y = source[0] + WIDTH, source[1] + HEIGHT // 2
    u, v = target[0], target[1] + HEIGHT // 2
    bend = (u - x) // 2
    path = f"M{x} {y}C{x + bend} {y} {u - bend} {v} {u} {v}"
    return f'<path d="{path}" fill="none" stroke="#777" stroke-width="1.3" marker-end="url(#head)"/>'


def _box(entry: Entry, x: int, y: int) -> str:
    fill, border = COLOURS.get(entry.state, OTHER)
    name = entry.name if len(entry.name) <= 20 else entry.name[:19] + "…"
    reason = escape(f"{entry.name}: {entry.state} {entry.reason}".strip())
    middle = f'x="{WIDTH // 2}" text-anchor="middle"'
    return (
        f'<g transform="translate({x} {y})"><title>{reason}</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="{border}" stroke-width="1.5"/>'
        f'<text {middle} y="18" font-size="13" font-weight="600" fill="#222">{escape(name)}</text>'
        f'<text {middle} y="34" font-size="11" fill="#555">{entry.stage.kind}: {entry.state}</text></g>'
    )

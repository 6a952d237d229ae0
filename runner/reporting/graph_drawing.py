"""The graph of a plan as a drawing: text for terminals, Mermaid for Markdown, SVG for everything else."""

from collections.abc import Iterator
from xml.sax.saxutils import escape

from runner.planning.plan import Entry, Plan
from runner.reporting.graph_layout import Layers, columns, layered

MARKS = {"cached": "✓", "run": "▶", "resume": "↻", "waiting": "·", "push": "↑", "skipped": "–", "paused": "‖"}
COLOURS = {  # fill and border by state, from the colour-blind safe palette of Okabe and Ito
    "cached": ("#e3f2ec", "#009e73"),
    "run": ("#e0eef8", "#0072b2"),
    "resume": ("#e0eef8", "#56b4e9"),
    "push": ("#fdf3d8", "#e69f00"),
    "paused": ("#fdf3d8", "#e69f00"),
}
OTHER = ("#f3f3f3", "#8a8a8a")
HEIGHT, LANE, ACROSS, DOWN, MARGIN = 54, 2, 38, 16, 12  # pixels: of a box, of a lane, between columns, between rows, around
MAX_NAME = 20  # characters of a name in a box


def as_text(plan: Plan) -> str:
    """A line per stage with what it reads, under the one of these that is furthest from the beginning."""
    column = columns({entry.name: plan.inputs(entry.name) for entry in plan})
    under: dict[str | None, list[Entry]] = {}
    for entry in plan:
        furthest = max(reversed(plan.inputs(entry.name)), key=column.__getitem__, default=None)
        under.setdefault(furthest, []).append(entry)

    def lines(parent: str | None, indent: str) -> Iterator[str]:
        for entry in under.get(parent, ()):
            sources = plan.inputs(entry.name)
            reads = f"  <- {', '.join(sources)}" if sources else ""
            yield f"{indent}{MARKS[entry.state]} {entry.name} ({entry.stage.kind}, {entry.state}){reads}"
            yield from lines(entry.name, indent + "  ")

    return "\n".join(lines(None, "")) + "\n"


def as_mermaid(plan: Plan) -> str:
    """A Mermaid flowchart, which GitHub, GitLab and the Hub draw in Markdown."""
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
    """A self-contained picture in layers from left to right, for a page or a file."""
    sources = {entry.name: plan.inputs(entry.name) for entry in plan}
    layers = layered(sources, box=HEIGHT, lane=LANE, gap=DOWN)
    width = _box_width(plan)
    step = width + ACROSS
    arrows = [_arrow(layers, source, name, width) for name, read in sources.items() for source in read]
    boxes = [_box(entry, layers.column[entry.name] * step, layers.middle[entry.name] - HEIGHT / 2, width) for entry in plan]
    wide = MARGIN * 2 + max(layers.column.values()) * step + width
    high = MARGIN * 2 + max(y + (HEIGHT if isinstance(node, str) else LANE) / 2 for node, y in layers.middle.items())
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high:.0f}" width="{wide}" height="{high:.0f}" '
            f'style="max-width:{wide}px" role="img" aria-label="stages of the recipe" font-family="system-ui, sans-serif">',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>',
            f'<g transform="translate({MARGIN} {MARGIN})">',
            *arrows,
            *boxes,
            "</g></svg>\n",
        ]
    )


def _arrow(layers: Layers, source: str, target: str, width: int) -> str:
    """A path from box to box: straight through the lanes of the columns between, curved between columns."""
    step = width + ACROSS
    x, y = layers.column[source] * step + width, layers.middle[source]
    path = f"M{x} {y:.1f}"
    for column, height in [*layers.route(source, target), (layers.column[target], layers.middle[target])]:
        u = column * step
        bend = (x + u) // 2
        path += f"C{bend} {y:.1f} {bend} {height:.1f} {u} {height:.1f}"
        if column != layers.column[target]:
            x, y = u + width, height
            path += f"H{x}"
    return f'<path d="{path}" fill="none" stroke="#777" stroke-width="1.3" marker-end="url(#head)"/>'


def _box_width(plan: Plan) -> int:
    """The width in pixels that fits the text of every box, by the character widths of DejaVu Sans, a wide font."""
    name = max(8.6 * min(len(entry.name), MAX_NAME) for entry in plan)
    return round(max(name, *(6.6 * max(len(entry.stage.kind), len(entry.state)) for entry in plan)) + 16)


def _box(entry: Entry, x: int, y: float, width: int) -> str:
    fill, border = COLOURS.get(entry.state, OTHER)
    name = entry.name if len(entry.name) <= MAX_NAME else entry.name[: MAX_NAME - 1] + "…"
    reason = escape(f"{entry.name}: {entry.state} {entry.reason}".strip())
    middle = f'x="{width / 2}" text-anchor="middle"'
    return (
        f'<g transform="translate({x} {y:.1f})"><title>{reason}</title>'
        f'<rect width="{width}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="{border}" stroke-width="1.5"/>'
        f'<text {middle} y="17" font-size="13" font-weight="600" fill="#222">{escape(name)}</text>'
        f'<text {middle} y="32" font-size="11" fill="#555">{entry.stage.kind}</text>'
        f'<text {middle} y="46" font-size="11" fill="#555">{entry.state}</text></g>'
    )


FORMS = {"text": as_text, "mermaid": as_mermaid, "svg": as_svg}

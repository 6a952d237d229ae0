"""A confusion matrix as SVG: the darker a cell, the larger the share of the rows of its expected label."""

from collections.abc import Sequence
from html import escape

CELL, MARGIN = 46, 8  # pixels
LETTER = 7  # the width of a letter of the labels, at most
LONGEST = 18  # characters of a label; all are in its tooltip
DARK = 0.55  # the share from which a number is white
RIGHT, WRONG = "0,158,115", "213,94,0"  # of Okabe and Ito, which people with any sight of colour tell apart


def confusion_svg(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The matrix (L, L): a row per expected label, a column per chosen one; the diagonal is right."""
    shown = [label if len(label) <= LONGEST else label[: LONGEST - 1] + "…" for label in labels]
    room = MARGIN + LETTER * max(map(len, shown)) + 6
    size = room + CELL * len(labels) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="confusion" viewBox="0 0 {size} {size}" width="{size}" '
        f'height="{size}" '
        'role="img" aria-label="confusion matrix" font-family="system-ui, sans-serif" font-size="12">'
    ]
    for place, (label, short) in enumerate(zip(labels, shown, strict=True)):
        middle, title = room + CELL * place + CELL / 2, f"<title>{escape(label)}</title>"
        parts.append(
            f'<text x="{room - 6}" y="{middle + 4}" text-anchor="end" fill="currentColor">{escape(short)}{title}</text>'
        )
        turned = f'transform="translate({middle + 4} {room - 6}) rotate(-90)"'
        parts.append(f'<text {turned} fill="currentColor">{escape(short)}{title}</text>')
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            parts.append(_cell(room, row, column, count, count / max(1, sum(line)), f"{labels[row]} as {labels[column]}"))
    return "".join([*parts, "</svg>\n"])


def _cell(room: int, row: int, column: int, count: int, share: float, what: str) -> str:
    x, y = room + CELL * column, room + CELL * row
    colour = RIGHT if row == column else WRONG
    number = "" if not count else f"{count:,}"
    ink = "#fff" if share > DARK else "currentColor"
    return (
        f"<g><title>{escape(what)}: {count:,} rows, {share:.0%}</title>"
        f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="3" fill="rgba({colour},{0.04 + 0.9 * share:.3f})"/>'
        f'<text x="{x + CELL / 2 - 1}" y="{y + CELL / 2 + 3}" text-anchor="middle" fill="{ink}">{number}</text></g>'
    )

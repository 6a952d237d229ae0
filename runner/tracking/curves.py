"""Training curves: read from metrics.jsonl, thinned for the record, and drawn with matplotlib as PNG or SVG.

matplotlib is imported only where something is drawn.
"""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = ("loss", "validation_loss")  # metrics kept in a record
POINTS = 100  # of a curve in a record
INCHES = (4.0, 2.8)  # of one plot

Curve = list[tuple[int, float]]  # step and value


def read_curves(metrics: Path, names: Iterable[str] = CURVES) -> dict[str, Curve]:
    """The curves `names` in a `metrics.jsonl`, and of their parts such as `validation_loss/en`; at most POINTS + 1 points
    each.

    Of a repeated step the last value counts.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    wanted = frozenset(found)
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # a kill cut the line short
            continue
        for name, value in values.items():
            if whole_of(name) in wanted and isinstance(value, float) and "step" in values:
                found.setdefault(name, {})[values["step"]] = value
    return {name: _thinned(sorted(points.items())) for name, points in found.items() if points}


def whole_of(name: str) -> str:
    """The metric that `name` is a part of, as that of one source; itself otherwise."""
    return name.partition("/")[0]


def _thinned(points: Curve) -> Curve:
    """Evenly spaced points, including the last one."""
    stride = -(-len(points) // POINTS)
    return [(step, float(f"{value:.5g}")) for step, value in [*points[:-1:stride], points[-1]]]


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Draws as matplotlib does by default: it reads a `matplotlibrc` in the current folder, which can have LaTeX run."""
    import matplotlib

    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        yield


@_own_settings()
def draw(trainings: Mapping[str, Mapping[str, Curve]], picture: Path) -> None:
    """Draws one plot per training, side by side; the file ending of `picture` decides the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0] * len(trainings), INCHES[1]), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(1, len(trainings), squeeze=False)[0], trainings.items(), strict=True):
        _plot(axes, {curve: points for curve, points in curves.items() if whole_of(curve) in CURVES and points}, title=name)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("loss, nats per token")
    figure.savefig(picture, dpi=120)


@_own_settings()
def as_svg(curves: Mapping[str, Curve], *, title: str, logarithmic: bool = False) -> str:
    """One plot of curves over the same steps, as an <svg> element; `logarithmic` where values span a factor of 10 or more."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    values = [value for points in curves.values() for _, value in points]
    wide = min(values) > 0 and max(values) >= 10 * min(values)  # otherwise a logarithmic axis has hardly any labels
    _plot(axes, curves, title=title, yscale="log" if logarithmic and wide else "linear")
    if len(curves) > 1:
        axes.legend(frameon=False)
    target = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # the same curves give the same bytes
        figure.savefig(target, format="svg", metadata={"Date": None}, transparent=True)  # on light and dark pages
    return target.getvalue()[target.getvalue().index("<svg") :]


def _plot(axes: "Axes", curves: Mapping[str, Curve], *, title: str, yscale: str = "linear") -> None:
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        style = "o--" if name.startswith("validation") else "-"
        axes.plot(steps, values, style, markersize=3, linewidth=1.2, label=name.replace("_", " "))
    axes.set(title=title, xlabel="step", yscale=yscale)
    axes.grid(alpha=0.3)

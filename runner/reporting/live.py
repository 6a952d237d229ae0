"""The view of a run on a terminal: all stages, the loss curve of the running one, the time left, and notes.

Only the line of the running stage moves, and notes stay until the end.
"""

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runner.planning.plan import Entry, Plan
from runner.reporting.graph_drawing import MARKS
from runner.reporting.progress import FORMATS, Eta, brief, describe, duration, position
from runner.terminal import console as printable_console

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 24  # losses in the curve
# Per second. Measured by runner.diagnostics.run_overhead: drawing 15 stages takes 4.4 ms of a core, 0.4% of two cores.
REFRESHES = 2
NOTES = 6  # that stay in view
AROUND = 12  # stages shown before and after the running one
POSITION = ("step", "steps", "done", "total", "unit")  # the metrics that tell how far a stage is
STYLES = {"done": "green", "running": "bold", "ahead": "dim"}


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of small bars, scaled from the lowest value to the highest."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


class LiveView:
    """A view that is redrawn in place; `expected` has the estimated seconds of stages, as far as known."""

    def __init__(self, expected: Mapping[str, float], *, console: Console | None = None) -> None:
        self._expected = dict(expected)
        self._outcomes: dict[str, str] = {}  # of stages that have ended
        self._reasons: dict[str, str] = {}
        self._order: list[str] = []
        self._running: str | None = None
        self._line: dict[str, Any] = {}  # the last value of each metric of the running stage
        self._losses: deque[float] = deque(maxlen=CURVE)
        self._eta, self._began = Eta(), 0.0
        self._notes: deque[str] = deque(maxlen=NOTES)
        self._live = Live(
            console=console or printable_console(sys.stderr), refresh_per_second=REFRESHES, get_renderable=self.render
        )

    def planned(self, plan: Plan) -> None:
        """Shows all stages; the cached ones are done."""
        self._order = [entry.name for entry in plan]
        self._reasons = {entry.name: entry.reason for entry in plan}
        self._outcomes = {entry.name: "cached" for entry in plan if entry.state == "cached"}
        self._live.start()

    def started(self, entry: Entry) -> None:
        """The stage is now the running one."""
        self._running, self._line, self._eta, self._began = entry.name, {}, Eta(), time.monotonic()
        self._reasons[entry.name] = entry.reason
        self._losses.clear()

    def reported(self, line: Mapping[str, Any]) -> None:
        """Updates bar and curve, or keeps a note."""
        self._eta.update(line)
        if "note" in line:
            self.note(f"{self._running}: {line['note']}")
            return
        self._line |= line
        if line.get("loss") is not None:
            self._losses.append(float(line["loss"]))

    def finished(self, entry: Entry, outcome: str) -> None:
        """The stage has ended."""
        self._outcomes[entry.name] = outcome
        if self._running == entry.name:
            self._running = None

    def note(self, text: str) -> None:
        """Keeps a message in view."""
        self._notes.append(text)

    def close(self) -> None:
        """Stops redrawing; the last view stays on the terminal."""
        self._live.stop()

    def render(self) -> Group:
        """The view at this moment."""
        table = Table.grid(padding=(0, 2))
        shown = self._window()
        if shown[0] > 0:
            table.add_row("", Text(f"{shown[0]} before", style="dim"), "")
        for name in self._order[slice(*shown)]:
            table.add_row(*self._row(name))
        if shown[1] < len(self._order):
            table.add_row("", Text(f"{len(self._order) - shown[1]} more", style="dim"), "")
        left = self.seconds_left()
        foot = [Text(f"about {duration(max(1.0, left))} left", style="dim")] if left is not None and self._running else []
        notes = [Text(f"• {note}", style="yellow") for note in self._notes]
        return Group(table, *foot, *notes)

    def seconds_left(self) -> float | None:
        """Until the recipe is done; None if the time of a stage ahead is unknown."""
        ahead = [name for name in self._order if name not in self._outcomes and name != self._running]
        if any(name not in self._expected for name in ahead):
            return None
        now = self._eta.seconds
        if now is None and self._running is not None:
            if self._running not in self._expected:
                return None
            now = max(0.0, self._expected[self._running] - (time.monotonic() - self._began))
        return (now or 0.0) + sum(self._expected[name] for name in ahead)

    def _window(self) -> tuple[int, int]:
        """The range of stages shown: all, or those around the running one."""
        if len(self._order) <= 2 * AROUND:
            return 0, len(self._order)
        here = self._order.index(self._running) if self._running in self._order else len(self._outcomes)
        first = max(0, min(here - AROUND, len(self._order) - 2 * AROUND))
        return first, min(len(self._order), first + 2 * AROUND)

    def _row(self, name: str) -> tuple[Text, Text, Any]:
        if name == self._running:
            return Text(MARKS["run"], style="cyan"), Text(name, style=STYLES["running"]), self._running_cell()
        if name in self._outcomes:
            return Text(MARKS["cached"], style=STYLES["done"]), Text(name), Text(self._outcomes[name], style="dim")
        expected = self._expected.get(name)
        estimate = "" if expected is None else f"about {duration(expected)}" if expected else "only if it is needed"
        return Text(MARKS["waiting"], style=STYLES["ahead"]), Text(name, style=STYLES["ahead"]), Text(estimate, style="dim")

    def _running_cell(self) -> Any:
        done, total = position(self._line)
        if not self._line:
            return Text(brief(self._reasons.get(str(self._running), "")), style="dim")
        where = Text(describe({name: self._line[name] for name in POSITION if name in self._line}, self._eta))
        first = Table.grid(padding=(0, 2))
        bar = [ProgressBar(total=total, completed=min(done, total), width=20)] if done is not None and total else []
        first.add_row(*bar, where)
        values = self._values()
        return Group(first, values) if values else first

    def _values(self) -> Text:
        """The metrics of the running stage on one line, cut off at the end of a narrow terminal."""
        parts = [
            shown.format(self._line[name])
            for name, shown in FORMATS.items()
            if name != "learning_rate" and self._line.get(name) is not None
        ]
        if share := share_of_peak(self._line):
            parts.append(f"{share:.0%} of peak")
        text = Text("  ".join(parts), no_wrap=True, overflow="ellipsis")
        if self._losses:
            text.append("  ").append(sparkline(self._losses), style="cyan")
        if self._line.get("learning_rate") is not None:
            text.append("  " + FORMATS["learning_rate"].format(self._line["learning_rate"]))
        return text


def share_of_peak(line: Mapping[str, Any]) -> float | None:
    """Floating-point operations per second, as a share of what the fastest matrix product on this hardware does."""
    tokens, flops, peak = (line.get(name) for name in ("tokens_per_second", "flops_per_token", "peak_flops"))
    return tokens * flops / peak if tokens and flops and peak else None

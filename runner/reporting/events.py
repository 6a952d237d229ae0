"""Views for programs: each event as a table for a function, and a page that a notebook shows in place of the one before."""

import time
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from runner.planning.plan import Entry, Plan
from runner.reporting.progress import Eta, JsonView, describe, position

PAGE_SECONDS = 0.5  # between two pages
NOTES = 8  # the last ones are shown


class EventView(JsonView):
    """Gives each event of `run --json` to a function."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._on_event = on_event
        self._name = ""

    def _write(self, event: str, **values: Any) -> None:
        self._on_event({"event": event, **values})


class NotebookView:
    """A bar for the running stage, a line for each finished one, and the last notes; `show` replaces the page."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._finished: list[str] = []
        self._notes: list[str] = []
        self._bar = ""
        self._name, self._eta, self._shown = "", Eta(), 0.0

    def planned(self, plan: Plan) -> None:
        """The stages that are cached."""
        cached = [entry.name for entry in plan if entry.state == "cached"]
        self._finished = [f"{', '.join(cached)}: cached"] if cached else []
        self._page()

    def started(self, entry: Entry) -> None:
        """An empty bar."""
        self._name, self._eta = entry.name, Eta()
        self._bar = f"<b>{escape(entry.name)}</b> {escape(entry.stage.kind)}"
        self._page()

    def reported(self, line: Mapping[str, Any]) -> None:
        """The bar as far as the line tells, and what it says."""
        self._eta.update(line)
        done, total = position(line)
        share = f' value="{done}" max="{total}"' if done is not None and total else ""
        self._bar = f"<b>{escape(self._name)}</b> <progress{share}></progress> {escape(describe(line, self._eta))}"
        if time.monotonic() - self._shown >= PAGE_SECONDS:
            self._page()

    def finished(self, entry: Entry, outcome: str) -> None:
        """How the stage ended."""
        self._finished.append(f"{entry.name}: {outcome}")
        self._bar = ""
        self._page()

    def note(self, text: str) -> None:
        """The message, among the last ones."""
        self._notes.append(text)
        self._page()

    def close(self) -> None:
        """The last page, without a bar."""
        self._bar = ""
        self._page()

    def _page(self) -> None:
        lines = [*map(escape, self._finished), self._bar, *(f"<small>{escape(note)}</small>" for note in self._notes[-NOTES:])]
        self._show("<br>".join(filter(None, lines)))
        self._shown = time.monotonic()

"""What a run reports while it goes on: one line per event for people, or one JSON object per event for programs. The view for
terminals is `runner.reporting.live`.

A view is fed with plan entries and with the lines of metrics.jsonl. It never asks a worker anything.
"""

import contextlib
import json
import textwrap
import time
from collections.abc import Mapping
from typing import IO, Any, Protocol

from runner.planning.plan import Entry, Plan

LINE_SECONDS = 10.0  # between two lines about the same stage
FORMATS = {  # of the metrics that a line shows
    "loss": "loss {:.3f}",
    "learning_rate": "learning rate {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "validation_loss": "validation loss {:.3f}",
    "validation_bits_per_byte": "{:.3f} bits per byte",
}


class RunView(Protocol):
    """What shows a run to the user."""

    def planned(self, plan: Plan) -> None:
        """The first plan of the run."""

    def started(self, entry: Entry) -> None:
        """A stage begins."""

    def reported(self, line: Mapping[str, Any]) -> None:
        """The running stage reported a line of metrics."""

    def finished(self, entry: Entry, outcome: str) -> None:
        """The stage has ended; `outcome` says how, in a few words."""

    def note(self, text: str) -> None:
        """A message for the user."""

    def close(self) -> None:
        """The run has ended."""


class Eta:
    """The time left for a stage, or for a part of it that counts anew, from its speed since the part's first report."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._part: tuple[Any, float] | None = None  # what is counted, and how much of it
        self._last = 0.0
        self.seconds: float | None = None  # None while it is unknown

    def update(self, line: Mapping[str, Any]) -> None:
        """Takes the position in a line of metrics into account."""
        done, total = position(line)
        if done is None or total is None:
            return
        now, part = time.monotonic(), (line.get("unit"), total)
        if self._part != part or done < self._last:
            self._first, self._part, self.seconds = None, part, None
        self._last = done
        if self._first is None:
            self._first = (now, done)
        elif done > self._first[1]:
            self.seconds = (now - self._first[0]) / (done - self._first[1]) * (total - done)


def position(line: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """How much of a stage is done, and the total, as far as a line of metrics tells."""
    if "steps" in line:
        return line.get("step"), line["steps"]
    return line.get("done"), line.get("total")


def describe(line: Mapping[str, Any], eta: Eta) -> str:
    """A line of metrics as text."""
    if "note" in line:
        return str(line["note"])
    parts = []
    done, total = position(line)
    if "step" in line:
        parts.append(f"step {done}/{total}" if total is not None else f"step {line['step']}")
    elif done is not None:
        parts.append(f"{done:,}/{total:,} {line.get('unit', '')}" if total else f"{done:,} {line.get('unit', '')}")
    parts += [shown.format(line[name]) for name, shown in FORMATS.items() if line.get(name) is not None]
    parts += [f"{source} {value:.3f}" for name, value in line.items() if (source := name.partition("validation_loss/")[2])]
    if eta.seconds is not None and done != total:
        parts.append(f"{duration(max(1.0, eta.seconds))} left")
    return "  ".join(part.strip() for part in parts)


def brief(reason: str) -> str:
    """The beginning of a long list of reasons; `run why` has them all."""
    return textwrap.shorten(reason, 100, placeholder=" ... (`run why` shows all)")


def duration(seconds: float) -> str:
    """Seconds as 7s, 1:05, 2:03:04 or 12 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours / 24:,.0f} days"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class PlainView:
    """One line per event, for pipes, logs and CI."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._width = 0
        self._name = ""
        self._eta = Eta()
        self._last_line = 0.0

    def planned(self, plan: Plan) -> None:
        """A line for each cached stage; the others get theirs when they start."""
        self._width = max(len(entry.name) for entry in plan)
        for entry in plan:
            if entry.state == "cached":
                self._write(entry.name, "cached")

    def started(self, entry: Entry) -> None:
        """The stage and why it runs."""
        self._name, self._eta = entry.name, Eta()
        self._last_line = time.monotonic()
        self._write(entry.name, f"{entry.stage.kind}: {brief(entry.reason)}")

    def reported(self, line: Mapping[str, Any]) -> None:
        """Notes and validations at once, the rest every LINE_SECONDS."""
        self._eta.update(line)
        now = time.monotonic()
        at_once = "note" in line or "validation_loss" in line
        if at_once or now - self._last_line >= LINE_SECONDS:
            self._write(self._name, describe(line, self._eta))
            self._last_line = self._last_line if at_once else now

    def finished(self, entry: Entry, outcome: str) -> None:
        """How the stage ended."""
        self._write(entry.name, outcome)

    def note(self, text: str) -> None:
        """The message on a line of its own."""
        _print(text, self._stream)

    def close(self) -> None:
        """Nothing to restore."""

    def _write(self, name: str, text: str) -> None:
        _print(f"{name:<{self._width}}  {text}", self._stream)


class JsonView:
    """One JSON object per line: `event`, `stage` where there is one, and what is known of it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._name = ""

    def planned(self, plan: Plan) -> None:
        """The state of every stage."""
        stages = [{"name": entry.name, "kind": entry.stage.kind, "state": entry.state} for entry in plan]
        self._write("planned", stages=stages)

    def started(self, entry: Entry) -> None:
        """The stage and why it runs."""
        self._name = entry.name
        self._write("started", stage=entry.name, kind=entry.stage.kind, reason=entry.reason, key=entry.key)

    def reported(self, line: Mapping[str, Any]) -> None:
        """The line of metrics as it is."""
        self._write("reported", stage=self._name, **line)

    def finished(self, entry: Entry, outcome: str) -> None:
        """How the stage ended."""
        self._write("finished", stage=entry.name, outcome=outcome)

    def note(self, text: str) -> None:
        """The message."""
        self._write("note", text=text)

    def close(self) -> None:
        """The last line."""
        self._write("closed")

    def _write(self, event: str, **values: Any) -> None:
        _print(json.dumps({"event": event, **values}, ensure_ascii=False), self._stream)


def _print(text: str, stream: IO[str]) -> None:
    """A line, or nothing once the reader is gone, which must not end a training."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=stream, flush=True)

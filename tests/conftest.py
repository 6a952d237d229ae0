"""Fixtures shared by all tests: a Context for a stage that is run by hand, and a Hub on a loopback port."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serve, use

from runner.stage import Context, Parallel


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    """Makes Contexts whose work folders lie in tmp_path; what the stage reports is in `context.report.lines`."""

    class Report:
        def __init__(self) -> None:
            self.lines: list[dict[str, Any]] = []

        def __call__(self, **values: Any) -> None:
            self.lines.append(values)

    def make(name: str = "stage", **changes: Any) -> Context:
        work = tmp_path / f"work-{name}"
        scratch = work / ".work"
        scratch.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = {
            "name": name,
            "work": work,
            "scratch": scratch,
            "inputs": {},
            "records": {},
            "recipe": "",
            "parallel": Parallel(),
            "cores": 2,
            "report": Report(),
            "should_stop": lambda: False,
        }
        return Context(**(fields | changes))

    return make


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub whose client waits for nothing; the token is that of its user."""
    with serve() as running:
        use(running, monkeypatch, tmp_path)
        yield running

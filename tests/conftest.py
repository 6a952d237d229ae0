"""How tests share the cores, and fixtures for all: a Context for a stage that is run by hand, and a Hub on loopback."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serve, use

from runner.resources import available_cores
from runner.stage import Context, Parallel

if "PYTEST_XDIST_WORKER" in os.environ:  # one test per core, not each on all of them
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    os.environ["STOCKPOT_CORES"] = "1"  # of the runs that a test starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell starts in the background, and all that that starts
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests interrupt runs
for own in ("STOCKPOT_CACHE", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):  # what tests trust or leave, the user does not
    os.environ[own] = tempfile.mkdtemp(prefix="stockpot-")
LONG_SECONDS = 3000.0  # for one test that is marked as long; the others have what pyproject.toml says
LONGEST = ["test_quickstart.py", "test_sweep.py", "test_bench.py", "test_torture.py"]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker per core and one more, since tests also wait; none for a single file, which they could not share: each takes
    seconds to start.
    """
    if len(config.args) == 1 and Path(config.args[0].partition("::")[0]).is_file():
        return 0
    return available_cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker begins them when the others have nothing left to do; long tests may last."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(LONG_SECONDS))


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
            "cores": 1,
            "report": Report(),
            "should_stop": lambda: False,
        }
        return Context(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what torch.compile makes; headers that it compiles for 8 s are then the same for all files and workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def compiled_code(compiled_folder: Path) -> Iterator[None]:
    """While the tests of a file run, torch.compile keeps what it makes in `compiled_folder`."""
    from torch._inductor import config

    # Processes that would compile take longer to start.
    with pytest.MonkeyPatch.context() as patch, config.patch(compile_threads=1):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled_folder))
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub whose client waits for nothing; the token is that of its user."""
    with serve() as running:
        use(running, monkeypatch, tmp_path)
        yield running

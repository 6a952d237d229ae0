"""Pages of datasets on the Hub, and settings in the current folder, which libraries of others read."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from llm.errors import InputError
from runner.safe_path import PYTHON
from runner.stages.corpus import hub_rows


def _builder(module: str, files: list[str]) -> Any:
    """What `datasets` makes of a page that names `files`."""
    kind = type("Builder", (), {"__module__": f"datasets.packaged_modules.{module}.{module}"})
    builder: Any = kind()
    builder.config = type("Config", (), {"data_files": {"train": files}})()
    return builder


@pytest.mark.parametrize(
    "file",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "local/owner/name/rows.jsonl",
        "https://evil.example/rows.jsonl",
        "http://169.254.169.254/latest/meta-data",
        "hf://datasets/owner/private@main/rows.jsonl",
        "hf://datasets/owner/name-other@main/rows.jsonl",
        "zip://rows.jsonl::file:///etc/archive.zip",
        "gzip://x::https://evil.example/x.gz",
        "s3://bucket/key",
        "sftp://user@host/x",
    ],
)
def test_the_page_of_a_dataset_names_files_of_that_dataset_alone(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *words, **options: _builder("json", [file]))
    with pytest.raises(InputError, match="expected files of this dataset on the Hub, got "):
        next(iter(hub_rows("owner/name", "a" * 40, config=None, split="train")))


@pytest.mark.parametrize(
    "form", ["webdataset", "audiofolder", "hdf5", "lance", "pandas", "sql", "iceberg", "pdffolder", "cache"]
)
def test_a_dataset_of_other_formats_is_refused(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *words, **options: _builder(form, []))
    with pytest.raises(InputError, match=f"expected files of json, csv, parquet, arrow, text, got {form}"):
        next(iter(hub_rows("owner/name", "a" * 40, config=None, split="train")))


DRAW = """
from pathlib import Path
from runner.tracking.curves import as_svg, draw
curves = {"loss": [(1, 2.0), (2, 1.0)]}
draw({"base": curves}, Path("curves.png"))
assert "<svg" in as_svg(curves, title="base")
"""


def test_a_matplotlibrc_in_the_current_folder_runs_no_latex(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.format: pdf\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("latex", "dvipng", "pdflatex", "kpsewhich"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (tools / name).chmod(0o755)
    import os

    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "MPLCONFIGDIR": str(tmp_path / "config")}
    done = subprocess.run([*PYTHON, "-c", DRAW], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists() and (tmp_path / "curves.png").exists()

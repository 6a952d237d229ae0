"""Small files that grow without bound when they are read."""

import gzip
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from runner.safe_path import PYTHON, safe_environment

READ = """
import resource, sys
from pathlib import Path
from llm.errors import InputError
from llm.text.readers import read_rows
before = resource.getrusage(resource.RUSAGE_SELF)
try:
    for row in read_rows([Path(sys.argv[1])], set()):
        row.fields()
except InputError as error:
    told = str(error)
else:
    told = "read"
after = resource.getrusage(resource.RUSAGE_SELF)
print(told)
assert after.ru_maxrss - before.ru_maxrss < 500 * 2**10, after.ru_maxrss
assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4
"""


def zst_line(folder: Path) -> Path:
    (path := folder / "line.jsonl.zst").write_bytes(zstandard.compress(bytes(2**24)) * 64)
    return path


def zst_text(folder: Path) -> Path:
    (path := folder / "text.txt.zst").write_bytes(zstandard.compress(b"\n" + bytes(2**24)) * 64)
    return path


def gz_line(folder: Path) -> Path:
    (path := folder / "line.jsonl.gz").write_bytes(gzip.compress(bytes(2**24)) * 32)
    return path


def archive(name: str, inner: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(path := folder / name, "w", zipfile.ZIP_DEFLATED) as file, file.open(inner, "w") as stream:
            for _ in range(8):
                stream.write(bytes(2**24))
        return path

    make.__name__ = name
    return make


BOMBS = [
    zst_line,
    zst_text,
    gz_line,
    archive("a.docx", "word/document.xml"),
    archive("a.xlsx", "xl/worksheets/sheet1.xml"),
    archive("a.ods", "content.xml"),
]


@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_a_file_that_grows_when_it_is_read_is_an_error_in_little_memory(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    assert path.stat().st_size < 2 * 2**20
    command = [*PYTHON, "-c", READ, str(path)]
    done = subprocess.run(command, env=safe_environment(dict(os.environ)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "at most " in done.stdout


def test_lines_that_compress_well_are_read(tmp_path: Path) -> None:
    from llm.text.readers import read_rows

    row = b'{"text": "' + b"the same " * 1000 + b'"}\n'
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(row * 1000))
    assert sum(1 for _ in read_rows([path], {"text"})) == 1000

"""K-quants by llama.cpp's own tools, `llama-quantize` and `llama-imatrix`, where they are installed.

The gguf package writes files of 4 to 8 bits in blocks of 32 numbers; K-quants, in blocks of 256 with scales of scales, it only
reads. An importance matrix says how much each column of a weight matters to texts, and makes the rounding follow it.
"""

import shutil
import subprocess
from pathlib import Path

from llm.errors import InputError
from llm.files import whole_file

QUANTIZE, IMPORTANCE = "llama-quantize", "llama-imatrix"
CURE = "install llama.cpp (https://github.com/ggml-org/llama.cpp), whose tools they are, so that they are on PATH"
CHUNK = 256  # tokens of a piece of text whose activations are averaged


def missing_tool(*, importance: bool) -> str | None:
    """The tool that is needed and not on PATH; None if all are there."""
    needed = [QUANTIZE, *([IMPORTANCE] if importance else [])]
    return next((tool for tool in needed if shutil.which(tool) is None), None)


def importance_matrix(model: Path, texts: Path, target: Path, *, cores: int) -> None:
    """Write the importance matrix of an unrounded file on the text in `texts`."""
    _call(
        IMPORTANCE,
        *("-m", model.name, "-f", texts.name, "-o", target.name, "-c", str(CHUNK), "-t", str(cores), "--no-ppl"),
        folder=target.parent,
    )


def quantize(source: Path, target: Path, kind: str, *, importance: Path | None, cores: int) -> None:
    """Write the unrounded file `source` as `kind`, such as q4_k_m. All files but `target` are in one folder: their names, not
    their paths, get into the file.
    """
    options = ["--imatrix", importance.name] if importance is not None else []
    with whole_file(target) as temporary:
        _call(QUANTIZE, *options, source.name, str(temporary), kind.upper(), str(cores), folder=source.parent)


def _call(tool: str, *options: str, folder: Path) -> None:
    if shutil.which(tool) is None:
        raise InputError(f"expected {tool}, got no such program: {CURE}")
    done = subprocess.run([tool, *options], cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = "; ".join(line for line in done.stderr.strip().splitlines()[-3:])
        raise InputError(f"{tool}: expected a file, got exit code {done.returncode}: {last or 'without a message'}")

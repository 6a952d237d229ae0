"""Shell completion as bash calls it: the real entry point in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"


def completions(line: str, folder: Path) -> set[str]:
    answer = folder / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    environment = {**os.environ, **asked, "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    subprocess.run([sys.executable, "-m", "runner.cli"], env=environment, check=True, timeout=60)
    return {word.strip() for word in answer.read_text(encoding="utf-8").split("\n")}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("run gr", {"graph"}),
        ("run plan recipes/x.toml --js", {"--json"}),
        (f"run why {QUICKSTART} me", {"medical"}),
        (f"run {QUICKSTART} --until tok", {"tokens", "tokenizer"}),
        ("run why none.toml me", {""}),
    ],
)
def test_tab_completes(line: str, expected: set[str], tmp_path: Path) -> None:
    assert completions(line, tmp_path) == expected

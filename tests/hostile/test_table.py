"""The table of inputs in the guide: each row has a test, and the test is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_input_in_the_guide_has_its_test() -> None:
    text = (ROOT / "recipes" / "guide.md").read_text(encoding="utf-8")
    table = text[text.index("| input | who parses it |") :].partition("\n\n")[0].splitlines()[2:]
    written = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    found = set(re.findall(r"^def (test_\w+)\(", written, re.MULTILINE))
    assert len(table) >= 20
    for row in table:
        *_, name, _ = (cell.strip() for cell in row.split("|"))
        assert name.strip("`") in found, row

"""Whatever a recipe holds, planning it ends in a plan or in a clean error: no traceback, no hang, no write, no network."""

import random
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mutations import mutated

from runner.cli import main
from runner.graph import input_files
from runner.recipe.head import Head
from runner.recipe.recipe import load_recipe
from runner.stages import stage_kinds

RECIPES = Path(__file__).parents[3] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.toml"))
SECONDS = 2.0  # of processor time for one recipe: a busy machine may let it wait as long as it likes
WATCHED = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
WATCHED |= {"subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "socket.bind", "exec", "import"}

_deeds: list[str] | None = None  # what was done while a list is there; an audit hook cannot be taken away again
_others: set[int | None] = set()  # threads that earlier tests left behind: what they do is not the plan's deed


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _deeds is None or threading.get_ident() in _others:
        return
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _deeds.append(f"open {arguments[0]} {arguments[1]}")
    elif event == "open" and arguments[1] is None and arguments[2] & 3:  # os.open to write
        _deeds.append(f"open {arguments[0]}")
    elif event in WATCHED - {"exec", "import"}:
        _deeds.append(f"{event} {arguments}")


sys.addaudithook(_watch)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the shipped recipes', whose mutated recipe is recipe.toml."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(RECIPES / "data", folder / "data")
    for path in SHIPPED:
        shutil.copy(path, folder / path.name)
    (folder / "file").touch()  # a cache below it can never be written
    return folder


def plan(place: Path, data: bytes, capsys: pytest.CaptureFixture[str], *, json: bool) -> int:
    """Plans a recipe; fails the test unless that ends as it must. Returns the exit code."""
    global _deeds, _others
    (place / "recipe.toml").write_bytes(data)
    words = ["plan", str(place / "recipe.toml"), "--cache", str(place / "file" / "cache"), *(["--json"] if json else [])]
    _others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    begun, _deeds = time.process_time(), []
    try:
        code = main(words)
        deeds = _deeds
    finally:
        _deeds = None
    seconds = time.process_time() - begun
    said = capsys.readouterr()
    assert code in (0, 2), said.err
    assert "Traceback" not in said.err
    assert (code == 0) == bool(said.out) and (code == 2) == bool(said.err)
    assert not [deed for deed in deeds if str(place / "file") not in deed]  # where the memo of digests would be
    assert seconds < SECONDS
    return code


def fuzz(place: Path, capsys: pytest.CaptureFixture[str], *, seed: int, count: int) -> Counter[int]:
    kinds = sorted(stage_kinds())
    fields = sorted({name for model in [Head, *stage_kinds().values()] for name in model.model_fields})
    texts = [path.read_text(encoding="utf-8") for path in SHIPPED]
    texts += [_flat(path) for path in SHIPPED]  # with what they extend, so that there is more to change
    codes: Counter[int] = Counter()
    for number in range(count):
        choose = random.Random(f"{seed}-{number}")
        data = mutated(choose.choice(texts), choose, kinds=kinds, fields=fields)
        try:
            codes[plan(place, data, capsys, json=number % 2 == 0)] += 1
        except BaseException as error:
            raise AssertionError(f"recipe {seed}-{number}:\n{data[:3000]!r}") from error
    return codes


def _flat(path: Path) -> str:
    import tomli_w

    return tomli_w.dumps(load_recipe(path).resolved())


def test_hundreds_of_mutated_recipes_end_in_a_plan_or_a_clean_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = fuzz(place, capsys, seed=1, count=250)
    assert codes[0] > 12 and codes[2] > 80, "both outcomes are exercised"


@pytest.mark.long
def test_twenty_thousand_mutated_recipes_end_in_a_plan_or_a_clean_error(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = fuzz(place, capsys, seed=2, count=20_000)
    assert codes[0] > 1_000 and codes[2] > 10_000


def test_the_shipped_recipes_themselves_plan_here(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in SHIPPED:
        assert plan(place, path.read_bytes(), capsys, json=True) == 0
        assert [field for stage in load_recipe(place / "recipe.toml").stages.values() for field, _ in input_files(stage)]

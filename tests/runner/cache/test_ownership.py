"""Which cache a recipe uses, and that nobody's forged results are taken for one's own."""

import shutil
from pathlib import Path

import pytest

from runner.cache.ownership import cache_of
from runner.errors import RecipeError

FOREIGN = "expected a cache that your runs made, got one that came with its folder"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("STOCKPOT_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "project" / "recipes").mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    return tmp_path / "project" / "recipes" / "x.toml"


def fill(cache: Path) -> None:
    (cache / "records").mkdir(parents=True, exist_ok=True)


def test_the_cache_is_where_the_options_say_else_beside_the_project(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_of(recipe, None) == tmp_path / "project" / "cache"
    assert cache_of(tmp_path / "loose.toml", None) == tmp_path / "cache"
    monkeypatch.setenv("STOCKPOT_CACHE", "/elsewhere")
    assert cache_of(recipe, None) == Path("/elsewhere")
    assert cache_of(recipe, Path("here")) == tmp_path / "here"


def test_a_cache_that_was_empty_at_the_first_command_is_the_users(recipe: Path) -> None:
    cache = cache_of(recipe, None)
    fill(cache)
    assert cache_of(recipe, None) == cache


def test_a_cache_that_came_with_its_folder_is_refused_until_the_user_names_it(recipe: Path) -> None:
    cache = recipe.parents[1] / "cache"
    fill(cache)
    with pytest.raises(RecipeError, match=FOREIGN):
        cache_of(recipe, None)
    assert cache_of(recipe, cache) == cache
    assert cache_of(recipe, None) == cache


def test_another_cache_at_the_path_of_ones_own_is_refused(recipe: Path, tmp_path: Path) -> None:
    """A stranger's archive is unpacked where the user had a cache; its number cannot be that of the user's."""
    cache = cache_of(recipe, None)
    shutil.rmtree(cache)
    fill(cache)
    (cache / "id").write_text("0" * 32)
    with pytest.raises(RecipeError, match=FOREIGN):
        cache_of(recipe, None)


def test_ones_own_cache_that_came_back_from_a_stranger_at_another_path_is_refused(recipe: Path, tmp_path: Path) -> None:
    fill(cache_of(recipe, None))
    shutil.copytree(recipe.parents[1], tmp_path / "sent-back")
    with pytest.raises(RecipeError, match=FOREIGN):
        cache_of(tmp_path / "sent-back" / "recipes" / "x.toml", None)


def test_an_empty_cache_that_came_with_a_number_gets_another_one(recipe: Path) -> None:
    """Else whoever sent it could send results later, under the number that the user's folder then knows."""
    sent = recipe.parents[1] / "cache" / "id"
    sent.parent.mkdir()
    sent.write_text("0" * 32)
    cache_of(recipe, None)
    assert sent.read_text() != "0" * 32
    fill(sent.parent)
    assert cache_of(recipe, None) == sent.parent


def test_a_folder_in_which_nothing_can_be_written_has_an_empty_cache(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not a folder")
    assert cache_of(recipe, None) == recipe.parents[1] / "cache"

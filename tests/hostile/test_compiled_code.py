"""Compiled code is run as soon as it is opened: none is taken from a cache, or from a folder that others can write to."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

from llm.device import find_compiler
from llm.files import private_folder
from llm.layers import cpp_kernel
from runner import compiled_code
from runner.cli import main
from runner.engine import launch
from runner.errors import StageError
from runner.options import store_of


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.delenv(compiled_code.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "stockpot" / "compiled"


def foreign(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder, 12345, 12345)


def writable(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def of_the_group(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def linked(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to("elsewhere")


def dangling(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.symlink_to("nowhere")


def a_file(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.touch()


UNSAFE = [foreign, writable, of_the_group, linked, dangling, a_file]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
EACH_UNSAFE = pytest.mark.parametrize("made", [pytest.param(foreign, marks=needs_root), *UNSAFE[1:]])


@EACH_UNSAFE
def test_a_folder_that_others_may_have_filled_is_refused(made: Callable[[Path], None], home: Path) -> None:
    made(home)
    with pytest.raises(OSError, match=str(home)):
        private_folder(home)
    with pytest.raises(StageError, match=f"{home}: expected a folder for compiled code that nobody else can write to, got: "):
        compiled_code.compiled_folder()


@EACH_UNSAFE
@pytest.mark.skipif(find_compiler() is None, reason="builds a library")
def test_a_library_in_such_a_folder_is_not_opened(made: Callable[[Path], None], tmp_path: Path) -> None:
    """The library writes a file when it is opened."""
    told, source, folder = tmp_path / "ran", tmp_path / "trap.cpp", tmp_path / "kernels" / "attention"
    source.write_text(
        f'#include <cstdio>\n__attribute__((constructor)) static void run() {{ fclose(fopen("{told}", "w")); }}\n'
        'extern "C" long weights_per_head(long n) { return n; }\n'
    )
    made(folder)
    place = (folder if folder.is_dir() else tmp_path) / "kernel.so"
    subprocess.run([str(find_compiler()), "-shared", "-fPIC", str(source), "-o", str(place)], check=True)
    with pytest.raises(OSError, match="attention"):
        cpp_kernel._load([str(find_compiler())], folder / "kernel.so")
    assert not told.exists()


def test_the_folder_is_made_for_its_owner_alone(home: Path) -> None:
    assert compiled_code.compiled_folder() == home
    assert home.stat().st_mode & 0o777 == 0o700
    home.chmod(0o755)  # others could read it, not write
    assert compiled_code.compiled_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("place", ["cache", "recipe/cache", "recipe/cache/compiled"])
def test_the_cache_of_a_stranger_decides_nothing_about_it(
    place: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pyproject.toml beside a recipe makes `cache/` there the cache, with all that came in it."""
    import argparse

    folder = tmp_path / "recipe"
    (folder / "cache" / "compiled" / "attention").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    (folder / "recipe.toml").touch()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("STOCKPOT_CACHE", raising=False)
    if place == "recipe/cache":
        assert store_of(argparse.Namespace(cache=folder / "cache"), folder / "recipe.toml").root == folder / "cache"
    else:
        monkeypatch.setenv("STOCKPOT_CACHE", str(tmp_path / place))
    environment = launch.environment_of(1)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(home)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", environment["TORCHINDUCTOR_CACHE_DIR"])
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert (cache_dir(), triton_cache_dir(0)) == (str(home), str(home / "triton" / "0"))  # as torch finds them


@pytest.mark.parametrize("chosen", ["", "kernels"])
def test_a_variable_that_is_empty_or_relative_does_not_mean_the_current_folder(
    chosen: str, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(compiled_code.VARIABLE, chosen)
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path / chosen) if chosen else str(home)
    assert launch.environment_of(1)["TORCHINDUCTOR_CACHE_DIR"] == expected


def test_gc_bounds_compiled_code(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = compiled_code.compiled_folder()
    for name, days in (("old/kernel.so", 31), ("new/kernel.so", 29), ("new/older.so", 40)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(1000))
        os.utime(folder / name, (time.time() - days * 86400,) * 2)
    words = ["gc", "--cache", str(tmp_path / "cache")]
    assert main([*words, "--dry-run"]) == 0
    assert "would remove 2.0 kB of compiled code; 1.0 kB left" in capsys.readouterr().out
    assert main(words) == 0
    assert "removed 2.0 kB of compiled code" in capsys.readouterr().out
    assert [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))] == ["new", "new/kernel.so"]


def test_the_oldest_code_goes_first_when_there_is_too_much(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compiled_code.compiled_folder()
    for day in range(5):
        (folder / f"{day}.so").write_bytes(bytes(1000))
        os.utime(folder / f"{day}.so", (time.time() - day * 86400,) * 2)
    monkeypatch.setattr(compiled_code, "MOST_BYTES", 2500)
    assert compiled_code.collect(dry_run=False) == (3000, 2000)
    assert sorted(path.name for path in folder.iterdir()) == ["0.so", "1.so"]

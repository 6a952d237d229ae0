"""Recipes from strangers: no path climbs out of the recipe's folder without the user's leave; no secret is written down."""

import json
import os
import time
from pathlib import Path

import pytest
from small_recipe import RECIPE, Folder

from runner.cli import COMMANDS, main
from runner.credentials import redact
from runner.errors import RecipeError
from runner.graph import input_files
from runner.input_files import glob_paths
from runner.recipe.recipe import Recipe, load_recipe
from runner.stages import stage_kinds

ROW = json.dumps({"text": "a private document that nobody may read but its owner"}) + "\n"
SECRETS = {
    "HF_TOKEN": "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",
    "AWS_ACCESS_KEY_ID": "AKIAZQ3EXAMPLEKEY777",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI+K7MDENG+bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEXAMPLESESSION+token+0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A recipe's folder with data, links out of it, and private files beside it."""
    inside, outside = tmp_path / "recipes", tmp_path / "private"
    (inside / "data" / "more").mkdir(parents=True)
    outside.mkdir()
    for path in (inside / "data" / "own.jsonl", inside / "data" / "more" / "own.jsonl", outside / "secret.jsonl"):
        path.write_text(ROW)
    (inside / "folder-link").symlink_to(outside)
    (inside / "file-link.jsonl").symlink_to(outside / "secret.jsonl")
    (inside / "inner-link.jsonl").symlink_to("data/own.jsonl")
    (inside / "inner-folder").symlink_to("data")
    (inside / "data" / "loop").symlink_to("..")
    (inside / "data" / "all").symlink_to("/")
    return inside


def recipe(place: Path, files: str, *, allowed: list[Path] | None = None) -> Recipe:
    path = place / "recipe.toml"
    path.write_text(f'name = "x"\n[stage.corpus]\nkind = "corpus"\nsources = [{{ files = {json.dumps(files)} }}]\n')
    return load_recipe(path, allowed=allowed or [])


def found(loaded: Recipe, place: Path) -> list[str]:
    ((_, file),) = input_files(loaded.stages["corpus"])
    return [os.path.relpath(path, place) for path in file.matches()]


ESCAPES = [
    "../private/secret.jsonl",
    "../private/absent.jsonl",
    "../private/*.jsonl",
    "data/../../private/secret.jsonl",
    "{outside}/secret.jsonl",
    "{outside}/*",
    "folder-link/secret.jsonl",
    "folder-link/*.jsonl",
    "folder-link/**/*.jsonl",
    "file-link.jsonl",
    "*.jsonl",
    "**/*.jsonl",
    "data/all/etc/passwd",
    "data/loop/../../../private/secret.jsonl",
    "inner-folder/../../private/secret.jsonl",
    "/etc/passwd",
    "/**",
    "~/../../../../../etc/passwd",
]


@pytest.mark.parametrize("files", ESCAPES)
def test_a_path_outside_is_refused_with_its_place_and_the_flag(place: Path, files: str) -> None:
    files = files.format(outside=place.parent / "private")
    stage_kinds()  # imports
    begun = time.process_time()
    with pytest.raises(RecipeError) as caught:
        recipe(place, files)
    assert time.process_time() - begun < 1
    message = str(caught.value)
    assert "stage.corpus.sources[0].files: expected a path in the recipe's folder" in message and "--allow-path " in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "files", ["../private/secret.jsonl", "folder-link/*.jsonl", "file-link.jsonl", "{outside}/secret.jsonl"]
)
def test_the_option_in_the_message_allows_the_path(place: Path, files: str) -> None:
    files = files.format(outside=place.parent / "private")
    with pytest.raises(RecipeError) as caught:
        recipe(place, files)
    folder = Path(str(caught.value).rpartition("--allow-path ")[2])
    assert folder == place.parent / "private"
    assert len(found(recipe(place, files, allowed=[folder]), place)) == 1


def test_a_refusal_does_not_reveal_whether_the_file_exists(place: Path) -> None:
    told = []
    for name in ("secret", "absent"):
        with pytest.raises(RecipeError) as caught:
            recipe(place, f"../private/{name}.jsonl")
        told.append(str(caught.value).replace(name, "NAME"))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("files", "matches"),
    [
        ("data/own.jsonl", ["data/own.jsonl"]),
        ("data/../data/own.jsonl", ["data/../data/own.jsonl"]),
        ("inner-link.jsonl", ["inner-link.jsonl"]),
        ("inner-folder/own.jsonl", ["inner-folder/own.jsonl"]),
        ("inner-folder/*.jsonl", ["inner-folder/own.jsonl"]),
        ("data/**/*.jsonl", ["data/more/own.jsonl", "data/own.jsonl"]),
        ("data/**", ["data/more/own.jsonl", "data/own.jsonl"]),
        ("d*/**/**/own.jsonl", ["data/more/own.jsonl", "data/own.jsonl"]),
        ("**/more/*", ["data/more/own.jsonl"]),
        ("*/*.jsonl", ["data/own.jsonl"]),
        ("data/[m-p]*.jsonl", ["data/own.jsonl"]),
        ("{inside}/data/own.jsonl", ["data/own.jsonl"]),
    ],
)
def test_files_inside_are_found_and_wildcards_follow_no_links(place: Path, files: str, matches: list[str]) -> None:
    for link in ("file-link.jsonl", "folder-link"):
        (place / link).unlink()
    assert found(recipe(place, files.format(inside=place)), place) == sorted(os.path.normpath(match) for match in matches)


def test_a_parent_folder_behind_a_wildcard_is_refused(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"expected no \.\. behind a wildcard"):
        recipe(place, "*/../../private/secret.jsonl")


def test_hidden_files_match_only_hidden_patterns(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x").touch()
    assert set(glob_paths(f"{tmp_path}/**")) == set()
    assert set(glob_paths(f"{tmp_path}/.h*/*")) == {tmp_path / ".hidden" / "x"}


def test_a_recipe_extends_only_files_in_its_folder(place: Path, tmp_path: Path) -> None:
    below = tmp_path / "below.toml"
    below.write_text('name = "below"\n[stage.corpus]\nkind = "corpus"\nsources = [{ files = "private/secret.jsonl" }]\n')
    path = place / "recipe.toml"
    path.write_text('extends = "../below.toml"\n')
    outside = "extends: expected a path in the recipe's folder .*, got '{}', which leads to .*--allow-path"
    with pytest.raises(RecipeError, match=outside.format("../below.toml")):
        load_recipe(path)
    (place / "link.toml").symlink_to(below)
    path.write_text('extends = "link.toml"\n')
    with pytest.raises(RecipeError, match=outside.format("link.toml")):
        load_recipe(path)
    assert load_recipe(path, allowed=[tmp_path]).head.name == "below"


def test_a_recipe_opened_through_a_link_is_limited_to_its_real_folder(place: Path, tmp_path: Path) -> None:
    recipe(place, "data/own.jsonl")
    (tmp_path / "link.toml").symlink_to(place / "recipe.toml")
    assert load_recipe(tmp_path / "link.toml").head.name == "x"


@pytest.mark.parametrize("command", ["run", "plan", "why", "show", "path", "bench", "prove-resume", "gc", "push", "pull"])
def test_every_command_that_loads_a_recipe_refuses_and_takes_the_flag_and_the_variable(
    place: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError):
        recipe(place, "../private/secret.jsonl")
    words = [command, str(place / "recipe.toml"), *(["corpus"] if command in ("why", "path", "prove-resume") else [])]
    words += [] if command == "show" else ["--cache", str(tmp_path / "cache")]
    assert main(words) == 2
    assert "--allow-path" in capsys.readouterr().err
    if command in ("plan", "why", "show", "gc"):
        assert main([*words, "--allow-path", str(tmp_path / "private")]) == 0
        monkeypatch.setenv("STOCKPOT_ALLOW_PATH", os.pathsep.join(["/nowhere", str(tmp_path / "private")]))
        assert main(words) == 0


def test_the_commands_above_are_all_that_load_a_recipe() -> None:
    assert set(COMMANDS) >= {"run", "plan", "why", "show", "path", "bench", "prove-resume", "gc", "push", "pull"}


def test_secrets_of_the_environment_and_passwords_in_addresses_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("USE_TOKEN_CACHE", "true")
    text = redact(f"{' '.join(SECRETS.values())} https://user:pass@host/x is true")
    assert not [value for value in SECRETS.values() if value in text]
    assert text.endswith("https://***@host/x is true")


def test_no_secret_is_written_or_printed_by_successful_or_failed_runs(tmp_path: Path) -> None:
    """The end-to-end test does the same with every kind of stage, aim and a release."""
    folder = Folder(tmp_path)
    folder.write(RECIPE + '\n[cache]\nremote = "hf://ada/cache"\n')
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1"}
    well = folder.call("run", str(folder.recipe), **SECRETS, **unreachable)
    assert well.returncode == 0, well.stderr
    with (folder.root / "text.jsonl").open("a") as file:
        file.write("{not json\n")
    badly = folder.call("run", str(folder.recipe), **SECRETS, **unreachable)
    assert badly.returncode == 2, badly.stderr  # the row is told before anything runs
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = (well.stdout + well.stderr + badly.stdout + badly.stderr).encode()
    assert b"tokenizer" in written
    for name, value in SECRETS.items():
        assert value.encode() not in written + said, name

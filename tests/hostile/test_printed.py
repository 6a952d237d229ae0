"""What strangers choose is printed as text, never obeyed by the terminal, and becomes no path; a server asks for a key."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from runner.cli import main
from runner.errors import RecipeError
from runner.recipe.recipe import load_recipe
from runner.terminal import console, printable, printable_streams

ESCAPES = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x1b]52;c;cm0gLXJm\x07",  # the clipboard
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31m",  # the same introducer as one byte of Latin-1
    "\x9d0;title\x9c",
    "\x90q\x9c",
    "over\rwritten",
    "erased\b\b\b\b\b\b",
    "\x7f\x00\x05\x0e",
    "\u202ecod.exe",  # text that runs backwards
    "\u2066isolated\u2069",
    "two\u2028lines\x85\x0b\x0c",
]
OBEYED = {chr(code) for code in (*range(32), 127, *range(128, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))} - {
    "\n",
    "\t",
}


@pytest.mark.parametrize("text", ESCAPES, ids=range(len(ESCAPES)))
def test_control_characters_are_written_out(text: str) -> None:
    shown = printable(text)
    assert not OBEYED & {*shown} and "\\u" in shown
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text
    assert printable("Ünïcødé 中文 ，🙂\n\t") == "Ünïcødé 中文 ，🙂\n\t"


@pytest.mark.parametrize("text", [*ESCAPES, "[bold red]x[/]", "[link=http://evil]x[/link]", "[/]", ":bomb:", "[@click=quit]x"])
def test_rich_shows_the_text_itself(text: str) -> None:
    out = io.StringIO()
    table = Table("head", title=text)
    table.add_row(text)
    for shown in (text, Text(text), table):
        console(out, width=200).print(shown)
    assert not OBEYED & {*out.getvalue()}
    if text.startswith(("[", ":")):
        assert out.getvalue().count(text) == 4


def test_colours_of_our_own_stay() -> None:
    out = io.StringIO()
    console(out, force_terminal=True, color_system="standard").print(Text("red", style="red"))
    assert "\x1b[31mred" in out.getvalue()


def test_errors_names_and_files_are_printed_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = tmp_path / "e\x1b]0;pwned\x07vil.toml"
    evil.write_text('name = "x"\ndescription = "\\u001b[2J\\u009b31m"\n[stage.a]\nkind = "\\u001b[31mcorpus"\n')
    assert main(["plan", str(evil)]) == 2
    assert main(["show", str(evil)]) == 2
    assert main(["plan", str(tmp_path / "no\x1b[31mne.toml")]) == 2
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    evil.write_text(
        'name = "x"\ndescription = "\\u001b[2J\\u009b31m\\u202e"\n'
        '[stage.a]\nkind = "corpus"\nsources = [{ files = "text.jsonl" }]\n'
    )
    assert main(["show", str(evil)]) == 0
    assert main(["plan", str(evil), "--json", "--cache", str(tmp_path / "cache")]) == 0
    out, err = capsys.readouterr()
    assert not OBEYED & {*out, *err}


def test_the_streams_are_those_of_before_after_a_command() -> None:
    streams = sys.stdout, sys.stderr
    with printable_streams():
        assert sys.stdout.isatty() is streams[0].isatty()
    assert (sys.stdout, sys.stderr) == streams


# Names


NAMES = [
    "../../x",
    "..",
    ".",
    ".hidden",
    "-rf",
    "a/b",
    "a\\\\b",
    "",
    "a b",
    "a\\u001b[2J",
    "a\\nb",
    "a\\u0000",
    "x" * 101,
    "<script>",
    "a@b",
    "[bold]",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_paths_options_or_markup_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    corpus = 'kind = "corpus"\nsources = [{ files = "text.jsonl" }]\n'
    path.write_text(f'name = "x"\n[stage."{name}"]\n{corpus}')
    with pytest.raises(RecipeError, match=r"expected a name of at most 100 letters"):
        load_recipe(path)
    path.write_text(f'name = "{name}"\n[stage.a]\n{corpus}')
    with pytest.raises(RecipeError, match=r"recipe\.toml: name: expected"):
        load_recipe(path)


def test_names_in_any_script_are_names(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    path.write_text('name = "模型-1.0"\n[stage."语料_a.b"]\nkind = "corpus"\nsources = [{ files = "text.jsonl" }]\n')
    assert list(load_recipe(path).stages) == ["语料_a.b"]


# Notices


ADDRESSES = [
    "json://127.0.0.1:8080/admin?method=PUT&+Authorization=x",
    "jsons://evil.example/?:key=value",
    "xml://127.0.0.1/",
    "form://127.0.0.1/?attach-as=x",
    "ntfy://127.0.0.1/topic",
    "ntfy://localhost/topic",
    "ntfy://user:pass@host/topic",
    "ntfy://topic?attach=http://127.0.0.1/",
    "ntfy://topic?verify=no",
    "discord://1/2?avatar_url=http://127.0.0.1",
    "discord://1/2#x",
    "file:///etc/passwd",
    "exec://id",
    "syslog://",
    "dbus://",
    "mailto://user:pass@gmail.com",
    "mqtt://127.0.0.1/topic",
    "apprise://127.0.0.1/token",
    "nodered://127.0.0.1",
    "slack://[::1]/a/b",
    "ntfy://a\u0661",
    "ntfy://topic\\n",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_recipe_chooses_no_host_method_or_header_of_a_notice(address: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'name = "x"\n[alerts]\nnotify = ["{address}"]\n')
    with pytest.raises(RecipeError, match=r"alerts\.notify: .* belongs in STOCKPOT_NOTIFY"):
        load_recipe(path)


@pytest.mark.parametrize("address", ["ntfy://my-topic", "discord://123/ab-c", "tgram://123:abc/456/", "pover://user@token"])
def test_topics_and_channels_are_taken(address: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    path.write_text(
        f'name = "x"\n[alerts]\nnotify = ["{address}"]\n[stage.a]\nkind = "corpus"\nsources = [{{ files = "text.jsonl" }}]\n'
    )
    assert load_recipe(path).head.alerts.notify == [address]


# The server


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
@pytest.mark.parametrize("key", ["", "  ", "short"])
def test_a_server_beyond_loopback_requires_a_key(
    host: str, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from runner.commands import serve

    monkeypatch.setenv("STOCKPOT_API_KEY", key)
    monkeypatch.setattr(serve, "servable_models", lambda *arguments: [])
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "recipe.toml").write_text('name = "x"\n[stage.a]\nkind = "corpus"\nsources = [{ files = "text.jsonl" }]\n')
    assert main(["serve", str(tmp_path / "recipe.toml"), "--host", host, "--port", "0"]) == 2
    assert "expected STOCKPOT_API_KEY with at least 16 characters" in capsys.readouterr().err


def test_the_host_check_stays_on() -> None:
    from runner.commands.serve import _hosts

    open_hosts = [*_hosts("0.0.0.0", ["models.example"])]
    assert "*" not in open_hosts and {"models.example", "localhost", "127.0.0.1"} <= {*open_hosts}
    assert [*_hosts("127.0.0.1", [])] == ["127.0.0.1", "localhost", "[::1]"]

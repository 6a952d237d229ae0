"""Alerts in a run: it pauses, sends a notice and resumes; and the fields of alerts in a recipe."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from small_recipe import Folder

from llm.training.alerts.config import Alerts
from runner.errors import RecipeError
from runner.execution.notifications import Notifier
from runner.graph import identity
from runner.recipe.recipe import Recipe, load_recipe

SECRET = "hunter2-in-an-address"
ADDRESSES = r"alerts\.notify: expected a list of apprise addresses, such as \[\"ntfy://TOPIC\"\] \(not shown: .*\); "


class Inbox(ThreadingHTTPServer):
    """A server that receives the notices."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), self._Handler)

    class _Handler(BaseHTTPRequestHandler):
        server: "Inbox"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.received.append(json.loads(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_run_paused_by_an_alert_exits_with_5_sends_a_notice_and_resumes_to_the_same_result(
    trained: Folder,
    fresh: Folder,
    inbox: Inbox,
) -> None:
    text = fresh.recipe.read_text()
    address = f"json://user:{SECRET}@127.0.0.1:{inbox.server_port}"
    elsewhere = f"json://127.0.0.1:{inbox.server_port}/bot/{SECRET}"  # a token as part of a path, as many services have it
    fresh.write(f"{text}\n[stage.base.alerts]\nloss = {{ above = 0.5, after = 30 }}\n")
    options = ("run", str(fresh.recipe))
    other = f"json://127.0.0.1:{inbox.server_port}/{SECRET}"
    done = fresh.call(*options, STOCKPOT_NOTIFY=f"{address} {elsewhere} {other}")
    assert done.returncode == 5, done.stderr
    output = "stage 'base': paused by the alert 'loss': the loss over the 10 steps before step 40 is "
    assert output in done.stderr and "usually helps" in done.stderr
    assert "Checkpointed after step 40 of 240; run the same command to continue" in done.stderr
    assert fresh.states()["base"] == "paused"
    messages = [notice["message"] for notice in inbox.received]
    assert len(messages) == 3 and len({*messages}) == 1 and messages[0].startswith("base: pause: the loss over the 10")
    assert all(notice["title"] == "Stockpot: small" for notice in inbox.received)
    done = fresh.call(*options, STOCKPOT_NOTIFY="json://127.0.0.1:1/nobody")
    assert done.returncode == 0, done.stderr
    assert fresh.digest("base") == trained.digest("base")
    assert SECRET not in done.stderr + fresh.call("show", str(fresh.recipe)).stdout
    for path in fresh.cache.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.long
def test_two_processes_with_sharded_weights_pause_and_resume_to_the_same_result(
    fresh: Folder,
    tmp_path: Path,
) -> None:
    other = Folder(Path(shutil.copytree(fresh.root, tmp_path / "undisturbed")))
    spread = ["--processes", "2", "--set", "parallel.strategy=fsdp", "--set", "stage.base.budget={steps=50}"]
    pausing = [*spread, "--set", "stage.base.alerts={loss={above=0.5, after=20}}"]
    done = fresh.run(*pausing)
    assert done.returncode == 5, done.stderr
    assert "paused by the alert 'loss'" in done.stderr and "Checkpointed after step 30 of 50" in done.stderr
    done = fresh.run(*pausing)
    assert done.returncode == 0, done.stderr
    assert "continues from step 30 of 50" in done.stderr
    done = other.run(*spread)
    assert done.returncode == 0, done.stderr
    digests = {
        json.loads(next(one.cache.glob("stages/pretrain-*/record.json")).read_text())["digest"] for one in (fresh, other)
    }
    assert len(digests) == 1


def test_a_notice_that_cannot_be_sent_is_one_warning_without_the_address(
    monkeypatch: pytest.MonkeyPatch, inbox: Inbox
) -> None:
    monkeypatch.setenv("STOCKPOT_NOTIFY", f"json://127.0.0.1:{inbox.server_port}")
    warnings: list[str] = []
    notices = Notifier("mine", [f"json://127.0.0.1:1/{SECRET}", "nothing://at-all"], warn=warnings.append)
    notices.send("first, with json://me:password@host in it")
    notices.send("second")
    assert [notice["message"] for notice in inbox.received] == ["first, with json://***@host in it", "second"]
    assert len(warnings) == 2 and not any(SECRET in warning for warning in warnings)
    assert warnings[0] == "warning: a notice could not be sent to address 1 of 3 (json://...)"


def recipe_with(folder: Path, head: str = "", stage: str = "") -> Recipe:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("words\n")
    (folder / "recipe.toml").write_text(
        f"""name = "one"
{head}
[stage.corpus]
kind = "corpus"
sources = [{{ files = "text.txt" }}]
[stage.tokenizer]
kind = "tokenizer"
corpus = "corpus"
vocab_size = 300
[stage.tokens]
kind = "pack"
corpus = "corpus"
tokenizer = "tokenizer"
context = 16
[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = {{ hidden_size = 32, layers = 1, heads = 2 }}
{stage}
"""
    )
    return load_recipe(folder / "recipe.toml")


def of_base(recipe: Recipe) -> tuple[Alerts, dict[str, Any]]:
    stage: Any = recipe.stages["base"]
    return stage.alerts, identity(stage, artifacts={"tokens": "0"}, files=lambda file: [])["fields"]


def test_a_stage_overrides_the_alerts_of_the_recipe_field_by_field(tmp_path: Path) -> None:
    head = "[alerts]\nloss = { above = 5.0, action = 'warn' }\ngap = { above = 2.0 }\n"
    alerts, _ = of_base(recipe_with(tmp_path, head, "[stage.base.alerts]\nloss = { above = 7.0 }\n"))
    assert (alerts.loss.above, alerts.loss.action, alerts.gap.above) == (7.0, "warn", 2.0)


def test_alerts_enter_the_key_only_where_they_change_the_training(tmp_path: Path) -> None:
    _, plain = of_base(recipe_with(tmp_path))
    _, output = of_base(
        recipe_with(tmp_path, "[alerts]\nloss = { above = 5.0, action = 'stop' }\ngap = { action = 'pause' }\n")
    )
    assert plain == output and "alerts" not in plain
    _, skipping = of_base(recipe_with(tmp_path, "[alerts]\ngradient_norm = { action = 'skip' }\n"))
    assert skipping == plain | {"alerts": {"gradient_norm": {"times": 10.0, "action": "skip"}}}
    _, once = of_base(recipe_with(tmp_path, "", "[stage.base.alerts]\ngradient_norm = { action = 'skip', back = 3 }\n"))
    assert once == skipping


@pytest.mark.parametrize(
    ("head", "place"),
    [
        ("[alerts]\nlos = { above = 5.0 }\n", r"alerts\.los: is not known here; .*did you mean 'loss'"),
        (
            "[alerts]\nvalidation = { action = 'skip' }\n",
            r"alerts\.validation\.action: expected 'off', 'warn', 'pause' or 'stop', got 'skip'",
        ),
        (
            "[alerts]\nnot_finite = { action = 'warn' }\n",
            r"alerts\.not_finite\.action: expected 'stop', 'skip' or 'rollback', got 'warn'",
        ),
        (f"[alerts]\nnotify = ['{SECRET}']\n", ADDRESSES),
        (f"[alerts]\nnotify = 'ntfy://{SECRET}'\n", ADDRESSES),
        (f"[alerts]\nnotify = ['ntfy://topic', {{ to = '{SECRET}' }}]\n", ADDRESSES),
    ],
)
def test_a_wrong_alert_is_reported_once(tmp_path: Path, head: str, place: str) -> None:
    with pytest.raises(RecipeError, match=place) as caught:
        recipe_with(tmp_path, head)
    assert len(str(caught.value).splitlines()) == 1 and SECRET not in str(caught.value)

"""Strangers at the port of machine 0, and machines that are not what they say: none ends a run, writes a file or is
unpickled."""

import contextlib
import hmac
import json
import os
import pickle
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from watched_processes import wait_for

from llm.training.checkpoint import _plain
from runner.cache.record import Record
from runner.errors import RecipeError, StageError
from runner.execution.node_layout import Layout
from runner.execution.stop import StopRequest
from runner.multi_node.connection import Connection, ConnectionClosed, ForeignError
from runner.multi_node.coordinator import Coordinator, opened
from runner.multi_node.messages import parsed
from runner.multi_node.participant import _record
from runner.multi_node.secret import VARIABLE, shared_secret
from runner.safe_path import PYTHON, safe_environment

SECRET = b"the secret of these machines, 0123456789"
HELLO = {"do": "hello", "rank": 1, "machines": 2, "who": "process 7 on there", "shares": True}


@pytest.fixture
def main_machine(tmp_path: Path) -> Iterator[tuple[Coordinator, int, list[str]]]:
    """Machine 0, which waits for one other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    notes: list[str] = []
    coordinator = Coordinator(
        Layout(2, 0, "127.0.0.1", port),
        tmp_path,
        remote=None,
        secret=SECRET,
        note=notes.append,
        stop=StopRequest(),
        rejoin_seconds=5.0,
    )
    with opened(coordinator):
        yield coordinator, port, notes


def raw(port: int) -> socket.socket:
    connected = socket.create_connection(("127.0.0.1", port), timeout=5)
    connected.settimeout(5)
    return connected


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    return ours, theirs


def met(secret: bytes = SECRET, other: bytes = SECRET) -> tuple[Connection, Connection]:
    """Both ends of a connection: machine 0 and another."""
    ours, theirs = pair()
    ends: list[Connection] = []
    thread = threading.Thread(target=lambda: ends.append(Connection(theirs, other, is_main=False)))
    thread.start()
    main = Connection(ours, secret, is_main=True)
    thread.join()
    return main, ends[0]


STRANGERS = {
    "refuse": b'{"do": "hello", "rank": 7, "machines": 3, "who": "x", "shares": true}\n',
    "stop": b'{"do": "stop"}\n',
    "nested": b"[" * 100_000 + b"\n",
    "pickle": pickle.dumps({"a": 1}) + b"\n",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no line": b"x" * 2_000_000,
    "empty lines": b"\n" * 100_000,
    "zeros": bytes(100_000),
    "greeting": bytes(32) + b'{"do": "hello", "rank": 1, "machines": 2, "who": "x", "shares": true}\n',
    "forged": bytes(32) + b"0" * 64 + json.dumps(HELLO).encode() + b"\n",
    "signed with a guess": bytes(32) + hmac.digest(b"", b"0 1\n", "sha256").hex().encode() + b"\n",
    "nothing": b"",
}


@pytest.mark.parametrize("said", STRANGERS)
def test_a_stranger_at_the_port_changes_nothing(said: str, main_machine: tuple[Coordinator, int, list[str]]) -> None:
    coordinator, port, notes = main_machine
    with raw(port) as stranger, contextlib.suppress(OSError):
        stranger.sendall(STRANGERS[said])
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(2**16):
            pass
    other = Connection(raw(port), SECRET, is_main=False)
    other.send(**HELLO)
    coordinator.assemble()
    coordinator.check()
    assert not coordinator._stop.requested
    assert not [note for note in notes if "another secret" not in note and "waiting for machine" not in note]
    other.close()


def test_many_silent_strangers_do_not_keep_a_machine_out_for_long(
    main_machine: tuple[Coordinator, int, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, port, _ = main_machine
    with contextlib.ExitStack() as held:
        for _ in range(100):
            held.enter_context(raw(port))
        time.sleep(0.1)
    other: Connection | None = None
    while other is None:
        with contextlib.suppress(ConnectionClosed):
            other = Connection(raw(port), SECRET, is_main=False)
    other.send(**HELLO)
    coordinator.assemble()


def test_another_secret_is_turned_away_on_both_sides(main_machine: tuple[Coordinator, int, list[str]]) -> None:
    _, port, notes = main_machine
    other = Connection(raw(port), b"another secret of some length, really", is_main=False)
    with pytest.raises(ForeignError):
        other.receive(5.0)
    stranger = raw(port)
    with stranger:
        stranger.sendall(STRANGERS["forged"])
        while stranger.recv(2**16):
            pass
    wait_for(lambda: notes, seconds=5)
    assert "with another secret and was turned away" in notes[0]


def test_lines_arrive_once_in_order_and_unchanged() -> None:
    main, other = met()
    other.send(**HELLO)
    main.send(do="note", text="x" * 300_000)
    received = other.receive(5.0)
    assert received is not None and received["text"] == "x" * 50_000
    assert main.receive(5.0) == {**HELLO, "remote": None}
    main.close()
    other.close()


def recorded(changed: Callable[[list[bytes]], list[bytes]]) -> type[Exception] | None:
    """What machine 0 makes of another machine's lines after somebody between them has `changed` them."""
    ours, middle = pair()
    between, theirs = pair()
    ends: list[Connection] = []
    thread = threading.Thread(target=lambda: ends.append(Connection(theirs, SECRET, is_main=False)))
    thread.start()
    greeting = threading.Thread(target=lambda: ends.append(Connection(ours, SECRET, is_main=True)))
    greeting.start()
    middle.sendall(between.recv(32))
    between.sendall(middle.recv(32))
    thread.join()
    greeting.join()
    other, main = sorted(ends, key=lambda end: end._is_main)
    other.send(do="stop")
    other.send(do="ready", attempt=1)
    lines, rest = [], b""
    while len(lines) < 2:
        *whole, rest = (rest + between.recv(2**16)).split(b"\n")
        lines += whole
    middle.sendall(b"".join(line + b"\n" for line in changed(lines)))
    with contextlib.closing(middle), contextlib.closing(between), contextlib.closing(main), contextlib.closing(other):
        try:
            while main.receive(0.5):
                pass
        except ForeignError:
            return ForeignError
    return None


@pytest.mark.parametrize(
    ("change", "end"),
    [
        (lambda lines: lines, None),
        (lambda lines: [lines[0], lines[0]], ForeignError),
        (lambda lines: lines[::-1], ForeignError),
        (lambda lines: lines[1:], ForeignError),
        (lambda lines: [lines[0].replace(b"stop", b"note")], ForeignError),
        (lambda lines: [lines[0][:64] + lines[1][64:]], ForeignError),
        (lambda lines: [lines[0] + b" "], ForeignError),
        (lambda lines: [b""], ForeignError),
        (lambda lines: [lines[0], b'{"do": "stop"}'], ForeignError),
    ],
    ids=range(9),
)
def test_lines_that_are_replayed_moved_or_changed_end_the_connection(
    change: Callable[[list[bytes]], list[bytes]], end: type[Exception] | None
) -> None:
    assert recorded(change) is end


BAD_MESSAGES = [
    b"[" * 100_000,
    b'{"do": ' * 10_000,
    b"null",
    b"{}",
    b'{"do": "exec", "code": "1"}',
    b'{"do": "welcome", "who": "x", "token": "../../x", "machines": 2}',
    b'{"do": "over", "code": "0", "message": "x"}',
    b'{"do": "over", "code": 1000000, "message": "x"}',
    b'{"do": "note", "text": {"a": 1}}',
    b'{"do": "note", "text": "x", "more": 1}',
    b'{"do": "train", "attempt": 1, "stage": "x", "processes": 1, "identities": [], "records": []}',
    b'{"do": "go", "attempt": 1e400}',
    b'{"do": "go", "attempt": 1} {"do": "go"}',
    b'{"do": "go", "attempt": ' + b"9" * 100_000 + b"}",
    b"\xff\xfe",
]


@pytest.mark.parametrize("line", BAD_MESSAGES, ids=range(len(BAD_MESSAGES)))
def test_a_message_of_another_form_is_refused(line: bytes) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match=r".*"):
        parsed(line, from_main=True)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("key", ["../../../evil", "a" * 64 + "/../x", "", "A" * 64, "a" * 63])
@pytest.mark.parametrize("kind", ["corpus", "../corpus", "no-such-kind"])
def test_a_record_of_machine_0_names_no_file_outside(kind: str, key: str) -> None:
    with pytest.raises(StageError, match="machine 0 sent a record"):
        _record(Record({"kind": kind, "key": key, "digest": "d"}).sealed.decode())


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "..", "a/b", "a\0b", "x\n"])
def test_a_checkpoint_of_the_main_process_has_plain_names(name: str) -> None:
    with pytest.raises(ValueError, match="expected plain names"):
        _plain(name)


# The secret


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "stockpot" / "machines.secret"


def test_the_secret_is_made_once_for_its_owner_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shared_secret()
    assert first == shared_secret() and len(first) == 64
    assert home.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(VARIABLE, "x" * 40)
    assert shared_secret() == b"x" * 40


def test_a_secret_that_others_can_read_or_that_is_short_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_secret()
    home.chmod(0o644)
    with pytest.raises(RecipeError, match="nobody else can read; chmod 600"):
        shared_secret()
    home.rename(home.with_name("other"))
    home.symlink_to("other")
    with pytest.raises(RecipeError, match="expected a file of yours"):
        shared_secret()
    home.unlink()
    home.write_text("short")
    home.chmod(0o600)
    with pytest.raises(RecipeError, match="at least 32 characters, got 5"):
        shared_secret()
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(RecipeError, match=VARIABLE):
        shared_secret()


# Between the processes of a training

PROCESS = """
import json, sys
import torch.distributed as dist
from torch.distributed import distributed_c10d

def refuse(*arguments, **options): raise RuntimeError("unpickled")

distributed_c10d._tensor_to_object = distributed_c10d._object_to_tensor = refuse
from llm.training.distributed.process_group import ProcessGroup
group = ProcessGroup(timeout_minutes=1)
assert group.size == 2
values = [True, None, "name", [1, 2.5], {"a": [None]}]
for value in values:
    assert group.from_main(value if group.is_main else "another") == value
assert group.bytes_from_main(bytes(range(256)) * 5000 if group.is_main else b"") == bytes(range(256)) * 5000
assert group.bytes_from_main(b"") == b""
dist.destroy_process_group()
"""


def test_processes_of_a_training_exchange_no_pickles() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = safe_environment(dict(os.environ)) | {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*PYTHON, "-c", PROCESS], env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    told = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], told


def test_no_function_for_pickled_objects_is_called() -> None:
    assert dist.broadcast_object_list  # the names below are torch's
    root = Path(__file__).parents[2]
    names = (
        "object_list",
        "gather_object",
        "pickle.load",
        "torch.load(",
        "allow_pickle=True",
        "yaml.load(",
        "shelve",
        "joblib",
    )
    found = [
        f"{path}: {name}"
        for folder in ("llm", "runner")
        for path in (root / folder).rglob("*.py")
        for name in names
        if name in path.read_text(encoding="utf-8")
    ]
    assert found == []

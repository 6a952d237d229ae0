"""Chats as tokens part by part: the same bytes from any number of processes, nothing made twice, and bounded memory."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import HYBRID, tokenizer_with

from llm.data.chat_dataset import write_rows
from llm.data.chat_parts import Table
from llm.data.conversations import PreferenceTemplate, Template
from llm.data.packing import PackedRows
from llm.errors import InputError
from llm.text.executor import LocalProcesses
from llm.tokenizer.tokenizer import TextTokenizer

ROOT = Path(__file__).parents[3]
TOKENIZER = tokenizer_with(HYBRID)
KILLED = """
import os, signal, sys
from pathlib import Path
from llm.data.chat_dataset import write_rows
from llm.data.chat_parts import Table
from llm.data.conversations import Template
from chat_templates import HYBRID, tokenizer_with

def report(done=0, **_):
    if done >= 36:
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
write_rows(folder / "rows", [Table((folder / "rows.jsonl",), Template())], tokenizer=tokenizer_with(HYBRID), context=96,
           part_bytes=1000, report=report, should_stop=lambda: False)
"""
MANY = """
import resource
from pathlib import Path
import sys
import numpy as np
from llm.data import packing
packing.PACKED_AT_ONCE = 2**13

folder, groups = Path(sys.argv[1]), 2**19
random = np.random.default_rng(0)
with packing.StreamWriter(folder) as writer:
    held = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + 12 * 2**20, -1))
    for _ in range(groups // 2**12):
        lengths = random.integers(2, 30, size=2**12, dtype=np.int32)
        ids = np.zeros(lengths.sum(), dtype=np.int32)
        writer.extend(packing.Streams(ids, ids > 0, lengths, lengths, np.ones(2**12, np.int32), np.ones(2**12, np.float32)),
                      source=0)
    assert 20 < writer.longest_group < 30
    found = writer.pack(row_lengths=[64], padding=0)
rows = packing.PackedRows(folder, seed=1)
rows.row(rows.rows_per_epoch // 2)
print(found["chats"], found["real_share"])
"""


def chat(number: int) -> dict[str, Any]:
    asked, said = (
        f"Is the heart {number} left? <b>{'心脏 ' * (number % 7)}",
        f"<think>\nSince {number}.\n</think>\n\nYes {number}.",
    )
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": turns * (1 + number % 3), "license": f"L{number % 3}"}


def preference(number: int) -> dict[str, str]:
    return {"prompt": f"How is {number}?", "chosen": f"Good, {number}.", "rejected": "Bad. " * (number % 5 + 1)}


def write(folder: Path, rows: list[dict[str, Any]], template: Any = Template(), **options: Any) -> dict[str, Any]:  # noqa: B008
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = Table((folder / "rows.jsonl",), template, **options.pop("table", {}))
    options = {"tokenizer": TOKENIZER, "context": 96, "report": lambda **_: None, "should_stop": lambda: False} | options
    return write_rows(folder / "rows", [table], **options)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("of_number", "template", "processes"), [(chat, Template(), 2), (preference, PreferenceTemplate(), 1)]
)
def test_any_number_of_processes_and_any_parts_write_the_same_bytes(
    tmp_path: Path, of_number: Any, template: Any, processes: int
) -> None:
    rows = [of_number(number) for number in range(60)]
    table = {"weight": 1.4}
    alone = write(tmp_path / "alone", rows, template, table=table)
    several = write(tmp_path / "several", rows, template, table=table, executor=LocalProcesses(processes), part_bytes=1200)
    assert several == alone and alone["chats"] > 60
    assert files_in(tmp_path / "several" / "rows") == files_in(tmp_path / "alone" / "rows")
    assert sorted(path.name for path in (tmp_path / "several").iterdir()) == ["rows", "rows.jsonl"]


def test_weights_of_classes_are_those_of_all_rows_whatever_the_parts(tmp_path: Path) -> None:
    rows = [{"prompt": f"Which {number}?", "labels": ["heart", "lung", "bone"][: 1 + number % 3]} for number in range(60)]
    template = Template("{prompt}", "{labels}", several="list")
    options: dict[str, Any] = {"table": {"weight": 1.4}, "class_weights": "balanced"}
    alone = write(tmp_path / "alone", rows, template, **options)
    assert write(tmp_path / "several", rows, template, part_bytes=500, **options) == alone
    assert files_in(tmp_path / "several" / "rows") == files_in(tmp_path / "alone" / "rows")
    packed = PackedRows(tmp_path / "several" / "rows", seed=0)
    weights = {value for index in range(packed.rows_per_epoch) for value in np.unique(packed.row(index).weights).tolist()}
    assert len(weights) > 4  # 0, and three classes of rows of one to three labels


def test_after_a_kill_finished_parts_are_used_and_the_bytes_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    rows = [chat(number) for number in range(40)]
    whole = write(tmp_path / "whole", rows)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "rows.jsonl").write_bytes((tmp_path / "whole" / "rows.jsonl").read_bytes())
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support' / 'models'}"}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(killed)], cwd=ROOT, check=False, env=environment)
    assert ended.returncode == -9 and not (killed / "rows").exists()
    parts = killed / "rows.parts"
    finished = {path.name: path.stat().st_ino for path in parts.glob("*.npz")}
    assert len(finished) > 5
    seen: list[dict[str, int]] = []
    resumed = write(
        killed, rows, part_bytes=1000, report=lambda **_: seen.append({p.name: p.stat().st_ino for p in parts.glob("*.npz")})
    )
    assert finished.items() <= seen[-1].items() and len(seen[-1]) > len(finished)
    assert resumed == whole and files_in(killed / "rows") == files_in(tmp_path / "whole" / "rows")


def test_parts_of_other_rows_or_settings_and_damaged_ones_are_made_again(tmp_path: Path) -> None:
    def stopped(rows: list[dict[str, Any]], **options: Any) -> Path:
        with pytest.raises(ZeroDivisionError):
            write(tmp_path, rows, report=lambda **_: 1 // 0, **options)  # after the first part
        return tmp_path / "rows.parts" / "000000.npz"

    rows = [chat(number) for number in range(3)]
    first = stopped(rows).read_bytes()
    inode = stopped(rows).stat().st_ino
    assert stopped(rows).stat().st_ino == inode
    for changed in ({"context": 40}, {"table": {"reasoning": "none"}}, {"tokenizer": TOKENIZER.with_empty_think_learned()}):
        assert stopped(rows, **changed).read_bytes() != first
        assert stopped(rows).read_bytes() == first
    assert stopped([chat(number) for number in range(1, 4)]).read_bytes() != first
    part = stopped(rows)
    part.write_bytes(first[: len(first) // 2])
    assert stopped(rows).read_bytes() == first


def test_the_first_bad_row_is_told_also_by_several_processes(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [chat(number) for number in range(60)]
    rows[41] = rows[29] = {"messages": "none"}
    with pytest.raises(InputError, match=r"rows\.jsonl:30: "):
        write(tmp_path, rows, executor=LocalProcesses(2), part_bytes=1000)


def test_a_tokenizer_is_the_same_in_another_process() -> None:
    given = TOKENIZER.with_empty_think_learned().with_words(["heartbeat"])
    restored: TextTokenizer = pickle.loads(pickle.dumps(given))
    turns = chat(5)["messages"]
    assert restored.encode_chat(turns) == given.encode_chat(turns)
    assert restored.encode("<|im_end|> heartbeat") == given.encode("<|im_end|> heartbeat")  # typed, so not the token
    assert (restored.ends, restored.template, restored.to_json()) == (given.ends, given.template, given.to_json())


def test_half_a_million_chats_are_packed_in_12_mib(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path / "rows")], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    chats, real_share = found.stdout.split()
    assert int(chats) == 2**19 and float(real_share) > 0.97

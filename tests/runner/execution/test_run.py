"""The command `run` in real subprocesses, with a small recipe of corpus, tokenizer and tokens."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from small_cache import unnoticed
from small_recipe import ALL_CACHED, RECIPE, WORDS, Folder
from watched_processes import wait_for, workers_of

from runner.cache import digests
from runner.cache.heartbeat import this_machine
from runner.cache.store import Store
from runner.engine import liveness


def test_a_second_run_does_nothing_and_imports_no_torch(finished: Folder) -> None:
    done = finished.call("run", str(finished.recipe), PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pydantic" in imported
    assert not imported & {"torch", "numpy", "transformers", "accelerate", "peft", "tokenizers", "aim", "huggingface_hub"}
    assert finished.states() == ALL_CACHED


def test_only_the_plan_is_on_stdout_and_it_names_key_and_path(finished: Folder) -> None:
    plan = json.loads(finished.call("plan", str(finished.recipe), "--json").stdout)
    assert plan["recipe"] == "small"
    for stage in plan["stages"]:
        assert set(stage) == {"name", "kind", "state", "reason", "key", "path", "cost"}
        assert len(stage["key"]) == 64
        assert Path(stage["path"]).is_dir()


def test_a_copied_folder_reruns_nothing(folder: Folder) -> None:
    assert folder.states() == ALL_CACHED


def test_comments_new_names_and_processes_rerun_nothing(folder: Folder) -> None:
    text = RECIPE.replace("tokenizer]", "words] # a comment").replace('tokenizer = "tokenizer"', 'tokenizer = "words"')
    folder.write(text.replace("vocab_size = 300", "vocab_size = 300\nmin_frequency = 2"))
    assert set(folder.states("--set", "parallel.processes=2").values()) == {"cached"}


def test_a_changed_field_reruns_only_the_stages_that_depend_on_it_and_is_named(folder: Folder) -> None:
    changed = ("--set", "stage.tokenizer.vocab_size=310")
    assert folder.states(*changed) == {"corpus": "cached", "tokenizer": "run", "tokens": "waiting"}
    why = folder.call("why", str(folder.recipe), "tokenizer", *changed)
    assert "vocab_size: 300 -> 310" in why.stdout and "never run" not in why.stdout
    folder.write(RECIPE.replace('name = "small"', 'name = "mine"'))
    why = folder.call("why", str(folder.recipe), "tokenizer", *changed)
    assert "never run\n  unlike small's tokenizer: vocab_size: 300 -> 310" in why.stdout


def test_a_document_that_cleaning_drops_reruns_only_the_corpus(folder: Folder) -> None:
    with (folder.root / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "short"}) + "\n")
    assert folder.states() == {"corpus": "run", "tokenizer": "waiting", "tokens": "waiting"}
    done = folder.run()
    assert done.returncode == 0, done.stderr
    assert "corpus" in done.stderr and "done in" in done.stderr
    assert "tokenizer  tokenizer:" not in done.stderr, "tokenizer ran although the corpus is the same"
    assert folder.states() == ALL_CACHED


def test_a_missing_artifact_is_rebuilt_only_when_a_stage_must_read_it(folder: Folder) -> None:
    before = folder.digest("tokenizer")
    shutil.rmtree(folder.artifact("tokenizer"))
    assert folder.states() == ALL_CACHED
    assert folder.call("path", str(folder.recipe), "tokenizer").returncode == 1
    assert folder.run().returncode == 0
    assert folder.call("path", str(folder.recipe), "tokenizer").returncode == 1
    changed = ("--set", "stage.tokens.context=16")
    assert folder.states(*changed) == {"corpus": "cached", "tokenizer": "run", "tokens": "run"}
    assert folder.run(*changed).returncode == 0
    assert folder.digest("tokenizer") == before


def test_a_damaged_artifact_is_set_aside_and_rebuilt_when_it_is_read(folder: Folder) -> None:
    file = folder.artifact("tokenizer") / "tokenizer.json"
    before = file.read_bytes()
    unnoticed(folder.cache, file, lambda path: path.write_bytes(b"[" + before[1:]))
    assert folder.states("--set", "stage.tokens.context=16") == {"corpus": "cached", "tokenizer": "cached", "tokens": "run"}
    done = folder.run("--set", "stage.tokens.context=16")
    assert done.returncode == 0, done.stderr
    assert "does not match its record" in done.stderr
    assert file.read_bytes() == before


def test_force_reruns_one_stage_and_not_those_below_it(folder: Folder) -> None:
    done = folder.run("--force", "tokenizer")
    assert done.returncode == 0
    assert "the old artifact is set aside" in done.stderr
    assert "tokens  pack" not in done.stderr
    assert len(list((folder.cache / "aside").iterdir())) == 1
    assert folder.states() == ALL_CACHED


def test_a_finished_stage_without_a_copy_of_its_record_is_used(folder: Folder) -> None:
    """The state after a kill between the rename of the folder and the copy of the record."""
    shutil.rmtree(folder.cache / "records")
    done = folder.run("--set", "stage.tokens.context=16")
    assert done.returncode == 0, done.stderr


def test_an_input_that_changes_while_the_run_waits_is_read_under_its_new_key(folder: Folder, tmp_path: Path) -> None:
    fresh = tmp_path / "cache"
    plan = json.loads(folder.call("plan", str(folder.recipe), "--json", "--cache", str(fresh)).stdout)
    log = Store(fresh).log("corpus", plan["stages"][0]["key"])
    log.parent.mkdir(parents=True)
    with log.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = subprocess.Popen(
            folder.command("run", "--until", "corpus", str(folder.recipe), "--cache", str(fresh)),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert "waiting for" in process.stderr.readline()
        folder.documents(
            ["a document that nobody had planned for, at the last moment"] * 2 + ["and another one for company, also new"]
        )
    process.communicate()
    assert process.returncode == 0
    (made,) = (fresh / "stages").iterdir()
    assert made.name != f"corpus-{plan['stages'][0]['key']}"


def test_a_closed_output_pipe_does_not_end_the_run(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "pipe")
    command = shlex.join(folder.command("run", str(folder.recipe), "--cache", str(folder.cache)))
    subprocess.run(["bash", "-c", f"{command} 2>&1 | head -1"], check=True, capture_output=True)
    assert folder.states() == ALL_CACHED


def test_until_runs_a_stage_and_its_ancestors(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "until")
    assert list(folder.states("--until", "corpus")) == ["corpus"]
    assert folder.run("--until", "corpus").returncode == 0
    assert folder.states() == {"corpus": "cached", "tokenizer": "run", "tokens": "waiting"}


def test_planning_writes_only_the_digests_of_files_that_are_not_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path / "plan")
    assert folder.states() == {"corpus": "run", "tokenizer": "waiting", "tokens": "waiting"}
    assert not folder.cache.exists()
    monkeypatch.setattr(digests, "FRESH_SECONDS", -1.0)
    assert folder.states() == {"corpus": "run", "tokenizer": "waiting", "tokens": "waiting"}
    assert [path.name for path in folder.cache.rglob("*")] == ["digests.json"]


def test_a_bad_row_is_told_before_anything_runs(folder: Folder) -> None:
    with (folder.root / "text.jsonl").open("a") as file:
        file.write("{not json\n")
    done = folder.run()
    assert done.returncode == 2
    assert f"stage.corpus.sources[0]: 1 of {len(WORDS) ** 2 + 1} rows" in done.stderr
    assert f"First {folder.root}/text.jsonl:{len(WORDS) ** 2 + 1}: expected one JSON object per line" in done.stderr


def test_a_bad_row_far_behind_the_first_ones_fails_with_stage_file_and_line_and_keeps_finished_stages(folder: Folder) -> None:
    with (folder.root / "text.jsonl").open("a") as file:
        file.writelines(f'{{"text": "row {number}"}}\n' for number in range(9_000))
        file.write("{not json\n")
    done = folder.run()
    assert done.returncode == 3
    assert f"stage 'corpus': {folder.root}/text.jsonl:{len(WORDS) ** 2 + 9_001}" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((folder.cache / "stages").iterdir())) == 3


def test_a_vocabulary_larger_than_the_text_supports_is_refused(folder: Folder) -> None:
    done = folder.run("--set", "stage.tokenizer.vocab_size=50000")
    assert done.returncode == 3
    assert "stage 'tokenizer':" in done.stderr and "50000" in done.stderr.replace(",", "")


def test_a_wrong_recipe_exits_with_2_and_an_unknown_stage_too(folder: Folder) -> None:
    assert folder.run("--set", "stage.tokenizer.kind=tokenizr").returncode == 2
    done = folder.run("--until", "tokns")
    assert done.returncode == 2
    assert "did you mean 'tokens'?" in done.stderr


@pytest.mark.parametrize("stage", ["corpus", "tokenizer", "tokens"])
def test_kill_9_of_a_run_ends_its_workers_and_the_next_run_ends_with_the_same_digest(
    finished: Folder, tmp_path: Path, stage: str
) -> None:
    folder = Folder(tmp_path / "killed")
    environment = {**os.environ, "STOCKPOT_CACHE": str(folder.cache)}
    process = subprocess.Popen(folder.command(str(folder.recipe)), env=environment, stderr=subprocess.DEVNULL)
    kind = {"tokens": "pack"}.get(stage, stage)
    wait_for(lambda: list((folder.cache / "work").glob(f"{kind}-*/.work/job.json")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not workers_of(folder))
    done = folder.run()
    assert done.returncode == 0, done.stderr
    assert [folder.digest(name) for name in ALL_CACHED] == [finished.digest(name) for name in ALL_CACHED]


def test_a_killed_worker_is_reported_with_its_signal(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "killed-worker")
    environment = {**os.environ, "STOCKPOT_CACHE": str(folder.cache)}
    process = subprocess.Popen(folder.command(str(folder.recipe)), env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: [pid for scratch in folder.cache.glob("work/*/.work") for pid in liveness.live_workers(scratch)])
    (scratch,) = folder.cache.glob("work/*/.work")
    for pid in liveness.live_workers(scratch):
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 3
    assert "stage 'corpus': its worker was killed by signal 9 (perhaps out of memory)" in errors


def test_an_interrupted_run_exits_with_130_and_resumes(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "interrupted")
    environment = {**os.environ, "STOCKPOT_CACHE": str(folder.cache)}
    process = subprocess.Popen(folder.command(str(folder.recipe)), env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((folder.cache / "work").glob("tokenizer-*/.work/job.json")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in errors
    assert folder.states()["corpus"] == "cached"
    assert folder.run().returncode == 0


def test_eight_concurrent_runs_make_each_stage_once_and_name_the_run_they_wait_for(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "crowd")
    environment = {**os.environ, "STOCKPOT_CACHE": str(folder.cache)}
    crowd = [
        subprocess.Popen(folder.command(str(folder.recipe)), env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    errors = [process.communicate()[1] for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 8, errors
    waits = 0
    for stage in ALL_CACHED:
        (maker,) = (number for number, text in enumerate(errors) if f"{stage:<9}  done in" in text)
        waited = [line for text in errors for line in text.splitlines() if line.startswith(f"{stage}: waiting for")]
        waits += len(waited)
        if waited:  # a stage that finishes immediately may keep no other run waiting
            assert any(f"process {crowd[maker].pid} on {this_machine().host}" in line for line in waited), waited
    assert waits
    assert len(list((folder.cache / "stages").iterdir())) == 3
    assert not list((folder.cache / "holders").iterdir())

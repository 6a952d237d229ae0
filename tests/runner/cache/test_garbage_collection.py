"""`run gc` removes artifacts that no recipe or recent run reaches, or the least recently used; never work in progress or
records."""

import json
import os
from pathlib import Path

import pytest
from small_cache import finish, key_for, small_cache
from small_recipe import Folder

from runner.cache.record import Record
from runner.cache.run_log import FOLDER, RECENT_DAYS, RECENT_RUNS, Run, log_run, logged_runs, recent
from runner.cache.store import Store, Waiting
from runner.cli import main
from runner.commands.gc import readable, size_in_bytes
from runner.recipe.recipe import load_recipe

DAY = 24 * 3600.0


def gc(store: Store, *options: str) -> int:
    return main(["gc", *options, "--cache", str(store.root)])


def note(store: Store, name: str, names: list[str], time: float) -> None:
    (store.root / FOLDER).mkdir(exist_ok=True)
    run = {"recipe": name, "path": "", "time": time, "names": names}
    (store.root / FOLDER / f"{name}.json").write_text(json.dumps(run))


def numbered(store: Store, number: int, **more: int) -> Record:
    return finish(store, "merge", key_for(str(number)), **more)  # type: ignore[arg-type]


def here(store: Store) -> set[str]:
    return {path.name for path in (store.root / "stages").iterdir()}


def files_of(root: Path) -> set[str]:
    return {str(path) for path in root.rglob("*")}


def test_an_artifact_that_no_recent_run_reaches_is_removed_and_its_record_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    kept, gone = numbered(store, 1), numbered(store, 2)
    note(store, "mine", [kept.name], 0.0)
    store.forget(gone.key)  # as after a kill before the copy was made
    assert gc(store) == 0
    assert here(store) == {kept.name}
    assert store.record("merge", gone.key) is not None
    assert f"stages/{gone.name}" in capsys.readouterr().out
    assert main(["verify", "--cache", str(tmp_path)]) == 0


def test_a_dry_run_reports_the_removals_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    kept, gone = numbered(store, 1), numbered(store, 2, size=1000)
    note(store, "mine", [kept.name], 0.0)
    before = files_of(tmp_path)
    assert gc(store, "--dry-run") == 0
    foretold = capsys.readouterr().out
    assert files_of(tmp_path) == before
    size = sum(path.stat().st_size for path in store.folder("merge", gone.key).rglob("*") if path.is_file())
    assert f"would remove {readable(size):>9}  stages/{gone.name}" in foretold
    assert f"would free {readable(size)};" in foretold
    assert gc(store) == 0
    done = capsys.readouterr().out
    assert done == foretold.replace("would remove", "removed").replace("would free", "freed")


def test_without_recipes_and_without_a_run_nothing_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = small_cache(tmp_path)
    before = here(store)
    assert gc(store) == 2
    assert gc(store, "--only") == 2
    assert here(store) == before
    assert "expected RECIPEs" in capsys.readouterr().err
    assert gc(Store(tmp_path / "empty")) == 0


def test_with_a_size_the_least_recently_used_artifacts_are_removed_and_no_more_than_needed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    records = [numbered(store, number, size=1000) for number in range(4)]
    for number, record in enumerate(records):
        os.utime(store.folder("merge", record.key), (number, number))
    note(store, "lately", [records[0].name], 10.0)
    size = sum(path.stat().st_size for path in (tmp_path / "stages").rglob("*") if path.is_file())
    assert gc(store, "--keep-size", str(size * 6 // 10)) == 0
    assert here(store) == {records[0].name, records[3].name}


def test_artifacts_in_use_are_not_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    read, made, free = (numbered(store, number) for number in range(3))
    work = store.work("merge", key_for("growing"))
    (work / ".work").mkdir(parents=True)
    with (
        store.reading([read], waiting=Waiting()),
        store.lock("merge", made.key, waiting=Waiting()),
        store.lock("merge", key_for("growing"), waiting=Waiting()),
    ):
        for options in (["--dry-run"], []):
            assert gc(store, "--keep-size", "0", *options) == 0
            output = capsys.readouterr().out
            assert output.count("kept, in use") == 3
    assert here(store) == {read.name, made.name}
    assert work.exists()
    assert free.name in output


def test_leftovers_are_removed_and_work_of_a_recent_run_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = numbered(store, 1)
    resumable, dead = f"merge-{key_for('resumable')}", f"merge-{key_for('dead')}"
    for place in (
        f"work/{resumable}/.work",
        f"work/{dead}/.work",
        "aside/x",
        f"arriving/{dead}-1",
        f"work/{record.name}/.work",
    ):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "file").write_text("x")
    (tmp_path / "stages" / record.name / ".work").mkdir()
    note(store, "mine", [record.name, resumable], 0.0)
    assert gc(store, "--keep-size", "0") == 0
    assert here(store) == set()
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*") if path.is_dir()}
    assert {path for path in left if not path.startswith("leases/")} == {f"work/{resumable}"}


def test_files_shared_by_hard_links_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    one, other = numbered(store, 1, size=1000), numbered(store, 2, size=1000)
    for name in one.files:
        (store.folder("merge", other.key) / name).unlink()
        (store.folder("merge", other.key) / name).hardlink_to(store.folder("merge", one.key) / name)
    note(store, "mine", [one.name], 0.0)
    assert gc(store) == 0
    freed = capsys.readouterr().out.rpartition("freed ")[2].partition(";")[0]
    assert freed.endswith(" B") or float(freed.split()[0]) < 50, "only what was not shared"


def test_runs_are_recent_by_number_and_by_days_before_the_newest(tmp_path: Path) -> None:
    runs = [(Path(), Run(str(number), "", 1e12 - number * 10 * DAY, ())) for number in range(40)]
    assert len(recent(runs)) == RECENT_RUNS
    close = [(Path(), Run(str(number), "", 1e12 - number * DAY, ())) for number in range(40)]
    assert len(recent(close)) == RECENT_DAYS + 1
    assert recent([]) == []


def test_a_damaged_entry_of_the_run_log_is_ignored(tmp_path: Path) -> None:
    store = Store(tmp_path)
    note(store, "good", [], 1.0)
    for number, text in enumerate(["", "[]", "{}", '{"recipe": 1}', "\udcff"]):
        (tmp_path / FOLDER / f"{number}.json").write_text(text, errors="surrogateescape")
    assert [run.recipe for _, run in logged_runs(tmp_path)] == ["good"]


def test_a_failing_run_keeps_the_results_of_the_run_before_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    resolved = load_recipe(folder.recipe).resolved()
    log_run(folder.cache, folder.recipe, resolved, ["a-1", "b-2"], until=None, complete=True)
    log_run(folder.cache, folder.recipe, resolved, ["a-3"], until=None, complete=False)
    log_run(folder.cache, folder.recipe, resolved, ["a-1"], until="corpus", complete=True)
    assert {name for _, run in logged_runs(folder.cache) for name in run.names} == {"a-1", "b-2", "a-3"}
    log_run(folder.cache, folder.recipe, resolved, ["a-3", "b-4"], until=None, complete=True)
    assert {name for _, run in logged_runs(folder.cache) for name in run.names} == {"a-1", "a-3", "b-4"}


def test_runs_are_logged_and_a_named_recipe_keeps_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    assert folder.run().returncode == 0
    assert folder.run("--set", "stage.tokens.context=16").returncode == 0
    store = Store(folder.cache)
    assert len(here(store)) == 4
    assert gc(store) == 0
    assert len(here(store)) == 4, "both runs are recent"
    assert gc(store, "--only", str(folder.recipe)) == 0
    assert len(here(store)) == 3
    assert folder.run().returncode == 0
    assert gc(store, "--keep-size", "0", str(folder.recipe)) == 0
    assert len(here(store)) == 3
    assert "the rest is in use, or used by a RECIPE" in capsys.readouterr().out
    assert gc(store, str(folder.root / "none.toml")) == 2


def test_sizes_are_parsed_with_their_units() -> None:
    assert size_in_bytes("20GB") == 20_000_000_000
    assert size_in_bytes("1.5 MB") == 1_500_000
    assert size_in_bytes("2KiB") == 2048
    assert size_in_bytes("7") == 7
    assert [readable(size) for size in (7, 1_500, 20_000_000_000, 3 * 10**12)] == ["7 B", "1.5 kB", "20.0 GB", "3.0 TB"]
    with pytest.raises(SystemExit):
        main(["gc", "--keep-size", "much"])

"""Rows from a dataset on the Hub: identified by their commit, downloaded once when a stage runs."""

import io
import json
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import OTHER_TOKEN, OWNER, TOKEN, Fault, File, Hub, Repository

from llm.data.chat_dataset import read_turns
from llm.errors import InputError
from runner.cache.record import Record
from runner.cache.store import Store
from runner.errors import RecipeError
from runner.graph import input_files
from runner.hub.download import download_dataset_files
from runner.hub.files import HubFiles
from runner.hub.model_card import learned_from
from runner.hub.retries import Retries
from runner.input_files import InputFile
from runner.planning.plan import Plan
from runner.recipe.recipe import Recipe, load_recipe
from runner.stages.fields.data_tables import TrainingTable

REPO = f"{OWNER}/reviews"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"text": "很好", "label": 1}, {"text": "太差, 不买", "label": 0}]
AT_ONCE = Retries(waits=(0.0, 0.0))
LOST = "http://127.0.0.1:9"  # no server listens there


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FILES = {
    "data/train-0.csv": 'text,label\n很好,1\n"太差, 不买",0\n'.encode(),
    "data/train-1.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "data/more/train-2.parquet": as_parquet(ROWS),
    "data/test-0.csv": b"text,label\nfair,0\n",
    "data/.train-9.csv": b"hidden",
}


@pytest.fixture
def dataset(hub: Hub) -> Repository:
    """A dataset with one commit."""
    made = hub.repositories[REPO] = Repository(private=False)
    made.commit("main", "rows", {name: File(data, lfs=False) for name, data in FILES.items()})
    return made


def at(dataset: Repository, path: str) -> HubFiles:
    return HubFiles(REPO, dataset.branches["main"], path)


def recipe(folder: Path, files: str, kind: str = "sft") -> Recipe:
    path = folder / "recipe.toml"
    texts = 'name = "x"\n[stage.base]\nkind = "checkpoint"\nrepo = "a/b"\n'
    table = f'{{ files = {json.dumps(files)}, prompt = "{{text}}", response = "{{label}}" }}'
    path.write_text(f'{texts}[stage.chat]\nkind = "{kind}"\nmodel = "base"\ndata = [{table}]\n')
    return load_recipe(path)


def keyed(folder: Path, files: str) -> str:
    """The planned key of a corpus of these files."""
    path = folder / "corpus.toml"
    path.write_text(f'name = "x"\n[stage.corpus]\nkind = "corpus"\nsources = [{{ files = {json.dumps(files)} }}]\n')
    return str(Plan(load_recipe(path), Store(folder / "cache")).entries["corpus"].key)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            f"hf://datasets/{REPO}/a.csv",
            "got none. To pin it, take the COMMIT of its branch from `git ls-remote https://hugg",
        ),
        (f"hf://datasets/{REPO}@main/a.csv", f"got 'main'. To pin it.*write hf://datasets/{REPO}@COMMIT/a.csv"),
        (f"hf://datasets/{REPO}@{COMMIT[:8]}/a.csv", f"got '{COMMIT[:8]}'"),
        (f"hf://{REPO}/a.csv", "expected hf://datasets/OWNER/NAME@COMMIT/PATH"),
        (f"hf://datasets/{REPO}@{COMMIT}/", "expected hf://datasets/OWNER/NAME@COMMIT/PATH"),
        (f"hf://datasets/{REPO}@{COMMIT}/../a.csv", "expected the path of a file in"),
    ],
)
def test_an_ambiguous_dataset_address_is_refused_with_the_cure(tmp_path: Path, files: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"stage\.chat\.data\[0\]\.files: .*{message}"):
        recipe(tmp_path, files)


def test_a_folder_field_does_not_accept_a_dataset_address(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'name = "x"\n[stage.base]\nkind = "checkpoint"\nfolder = "hf://datasets/{REPO}@{COMMIT}/model"\n')
    with pytest.raises(RecipeError, match="expected a local folder"):
        load_recipe(path)


def test_commit_and_path_are_the_identity_and_planning_sends_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", LOST)
    one = keyed(tmp_path, f"hf://datasets/{REPO}@{COMMIT}/a.csv")
    assert keyed(tmp_path, f"hf://datasets/{REPO}@{COMMIT}/a.csv") == one
    others = {
        keyed(tmp_path, f"hf://datasets/{REPO}@{COMMIT[::-1]}/a.csv"),
        keyed(tmp_path, f"hf://datasets/{REPO}@{COMMIT}/b.csv"),
        keyed(tmp_path, f"hf://datasets/{OWNER}/others@{COMMIT}/a.csv"),
    }
    assert len(others | {one}) == 4


def test_a_resolved_recipe_names_the_same_files(tmp_path: Path) -> None:
    address = f"hf://datasets/{REPO}@{COMMIT}/**/train-*.csv"
    loaded = recipe(tmp_path, address)
    assert loaded.resolved()["stage"]["chat"]["data"][0]["files"] == address
    assert [str(file) for _, file in input_files(loaded.stages["chat"])] == [address]


def test_a_pattern_matches_as_it_would_in_a_folder(dataset: Repository, tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for pattern in (
        "data/train-*",
        "data/*/*",
        "**/train-*",
        "**/*.csv",
        "data/**",
        "**",
        "data/train-[01].*",
        "data/.train*",
    ):
        here = [path.relative_to(tmp_path).as_posix() for path in InputFile(pattern, tmp_path).matches()]
        assert at(dataset, pattern).matching(FILES) == [name for name in here if name in FILES], pattern


@pytest.mark.parametrize("path", [*(name for name in FILES if "train" in name and ".train" not in name), "**/train-*"])
def test_rows_of_every_format_are_read_with_label_names(dataset: Repository, tmp_path: Path, path: str) -> None:
    table = TrainingTable(
        files=InputFile(str(at(dataset, path)), tmp_path),
        prompt="{text}",
        response="{label}",
        words={"0": "负面", "1": "正面"},
    )
    turns = [turns for _, turns, *_ in read_turns(table.files.fetched(), table.template)]
    output = [tuple(turn.content for turn in row) for row in turns if not isinstance(row, InputError)]
    assert output == [("很好", "正面"), ("太差, 不买", "负面")] * (3 if "*" in path else 1)


def test_a_label_without_a_name_is_reported_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\ngood,1\nfair,2\n")
    table = TrainingTable(
        files=InputFile("rows.csv", tmp_path), prompt="{text}", response="{label}", words={"0": "no", "1": "yes"}
    )
    *_, (_, bad, *_) = read_turns(table.files.fetched(), table.template)
    assert "rows.csv:3: expected one of the labels in words, '0', '1', got '2'" in str(bad)


@pytest.mark.parametrize("path", ["data/train-0.csv", "**/train-*"])
def test_downloaded_files_are_cached_and_need_no_network(
    dataset: Repository, hub: Hub, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    first = download_dataset_files(at(dataset, path))
    requests = len(hub.requests)
    assert requests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", LOST)
    assert download_dataset_files(at(dataset, path)) == first
    assert len(hub.requests) == requests
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set; run once without it"):
        download_dataset_files(at(dataset, "data/test-*.csv" if path == "data/train-0.csv" else "data/test-0.csv"))


def test_a_busy_hub_is_asked_again(dataset: Repository, hub: Hub) -> None:
    busy = [Fault(status=HTTPStatus.SERVICE_UNAVAILABLE)] * 7  # after which the client itself gives up
    hub.fault_in["data/train-0.csv"] = list(busy)
    with pytest.raises(InputError, match=r"503.*run again to continue"):
        download_dataset_files(at(dataset, "data/train-0.csv"), retries=Retries(waits=()))
    hub.fault_in["data/train-0.csv"] = list(busy)
    (path,) = download_dataset_files(at(dataset, "data/train-0.csv"), retries=AT_ONCE)
    assert path.read_bytes() == FILES["data/train-0.csv"]


def test_refusals_of_the_hub_are_reported_with_a_cure(dataset: Repository, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def error_of(files: HubFiles) -> str:
        with pytest.raises(InputError) as caught:
            download_dataset_files(files, retries=AT_ONCE)
        assert TOKEN not in str(caught.value) and OTHER_TOKEN not in str(caught.value)
        return str(caught.value)

    assert "has no file data/missing.csv in this dataset" in error_of(at(dataset, "data/missing.csv"))
    assert "expected files like 'no/*.csv', but the dataset has none" in error_of(at(dataset, "no/*.csv"))
    assert "of this dataset" in error_of(HubFiles(REPO, COMMIT, "data/*.csv"))
    assert "no such dataset, or the token has no access" in error_of(HubFiles(f"{OWNER}/none", COMMIT, "data/*.csv"))
    dataset.gated = True
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    assert f"accept its terms at {hub.url}/datasets/{REPO}" in error_of(at(dataset, "data/train-0.csv"))
    monkeypatch.setenv("HF_ENDPOINT", LOST)
    assert f"data/test-0.csv cannot be downloaded from {LOST}" in error_of(at(dataset, "data/test-0.csv"))


def test_a_run_downloads_its_rows_and_a_second_run_sends_no_request(dataset: Repository, hub: Hub, tmp_path: Path) -> None:
    long = [{"text": f"{number} is a document with enough words to stay in the corpus"} for number in range(30)]
    dataset.commit("main", "text", {"text.parquet": File(as_parquet(long), lfs=False)})
    path = tmp_path / "recipe.toml"
    sources = f'[{{ files = "{at(dataset, "*.parquet")}" }}]'
    path.write_text(f'name = "x"\n[stage.corpus]\nkind = "corpus"\nsources = {sources}\nnear_duplicates = false\n')

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "runner.cli", *words, str(path), "--cache", str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(run("plan", "--json"))["stages"][0]["state"] == "run"
    assert not hub.requests
    run()
    requests = len(hub.requests)
    assert requests
    assert json.loads(run("plan", "--json"))["stages"][0]["state"] == "cached"
    run()
    assert len(hub.requests) == requests
    (record,) = map(Record.read, (tmp_path / "cache" / "records").iterdir())
    assert sum(record.data["metrics"]["sources"]["source-1"][part] for part in ("train", "validation")) == 30
    ((_, place, *_),) = learned_from("corpus", record.data, load_recipe(path).resolved()["stage"]["corpus"])
    assert f"[{REPO}](https://huggingface.co/datasets/{REPO}/tree/{dataset.branches['main']}): *.parquet" in place

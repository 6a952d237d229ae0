"""The kind `checkpoint`: models from a folder and from a Hub, and everything that goes on from there."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import FAMILIES, llama_2, llama_3
from hub_server import OWNER, TOKEN, File, Hub, Repository, serve
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm.errors import InputError, Interrupted
from llm.export.gguf import write_gguf
from llm.models.checkpoint import load_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer
from runner.artifacts import Checkpoint
from runner.cache.store import Store
from runner.errors import RecipeError
from runner.graph import identity, key_of
from runner.input_files import InputFile
from runner.planning.plan import Plan
from runner.recipe.recipe import load_recipe
from runner.stage import Context
from runner.stages.checkpoint import ImportCheckpoint, ModelFolder
from runner.stages.evaluate import Evaluate
from runner.stages.lora import TrainAdapter
from runner.stages.merge import Merge
from runner.stages.sft import FineTune

REPO = f"{OWNER}/tiny"
BASE = '[stage.base]\nkind = "checkpoint"\n'
ANSWERS = {"the heart": "pumps blood", "the lungs": "breathe air"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, as its publisher saved it."""
    folder = tmp_path_factory.mktemp("published")
    for name, build in FAMILIES.items():
        build(folder / name)
    return folder.__truediv__


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield running


def put(hub: Hub, folder: Path, *, private: bool = False, gated: bool = False, **more: bytes) -> str:
    """The commit that publishes a model folder, with more files (a dot in a name written as __)."""
    repository = hub.repositories.setdefault(REPO, Repository(private=private, gated=gated))
    files = {path.name: File(path.read_bytes(), lfs=path.suffix == ".safetensors") for path in folder.iterdir()}
    files |= {name.replace("__", "."): File(data, lfs=name.endswith("bin")) for name, data in more.items()}
    return repository.commit("main", "a model", files).oid


def test_a_gguf_file_in_a_folder_and_in_a_repository_becomes_the_same_checkpoint(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    of_folder(published("smollm")).run(source := make_context("source"))
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "smol-Q8_0.gguf"
    write_gguf(source.work, path, precision="q8_0")
    commit = put(hub, tmp_path / "files")
    local, remote = make_context("local"), make_context("remote")
    facts = of_folder(path).run(local)
    assert of_repo(gguf=path.name).run(remote) == {**facts, "repo": REPO, "revision": "main", "commit": commit}
    made = {name: (local.work / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert made == {name: (remote.work / name).read_bytes() for name in made}
    assert facts["dtype"] == "float16"
    for place in (path, path.parent):  # the only one of a folder stands for it
        assert of_folder(place).folder.matches() == [path]  # type: ignore[union-attr]  # it has a folder
    assert of_folder(path.parent).run(make_context("whole")) == facts
    with pytest.raises(InputError, match=r"expected the file other\.gguf, got none; its GGUF files: smol-Q8_0\.gguf"):
        of_repo(gguf="other.gguf").run(make_context("other"))
    with pytest.raises(ValidationError, match="expected a repo on the Hub beside it"):
        of_folder(path, gguf="smol-Q8_0.gguf")


def test_a_tokenizer_that_llama_cpp_lacks_is_refused_before_anything_runs(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(published("smollm"), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFKC"}}))
    (tmp_path / "recipe.toml").write_text(
        f'name = "small"\n{BASE}folder = "model"\n'
        '[stage.half]\nkind = "merge"\nbase = "base"\nadapters = ["adapter"]\n'
        '[stage.adapter]\nkind = "lora"\nbase = "base"\ndata = [{ files = "rows.jsonl" }]\nbudget = { steps = 1 }\n'
        '[stage.gguf]\nkind = "gguf"\nmodel = "half"\n'
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(RecipeError, match=r"stage\.gguf\.model: .*tokenizer\.json: expected no normalizer, or NFC"):
        load_recipe(tmp_path / "recipe.toml")


def test_a_tokenizer_from_the_hub_that_llama_cpp_lacks_is_refused_before_anything_is_trained(
    published: Callable[[str], Path], hub: Hub, tmp_path: Path
) -> None:
    shutil.copytree(published("smollm"), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFKC"}}))
    put(hub, tmp_path / "model")
    (tmp_path / "recipe.toml").write_text(
        f'name = "small"\n{BASE}repo = "{REPO}"\n'
        '[stage.half]\nkind = "merge"\nbase = "base"\nadapters = ["adapter"]\n'
        '[stage.adapter]\nkind = "lora"\nbase = "base"\ndata = [{ files = "rows.jsonl" }]\nbudget = { steps = 1 }\n'
        '[stage.gguf]\nkind = "gguf"\nmodel = "half"\n'
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    command = [sys.executable, "-m", "runner.cli", str(tmp_path / "recipe.toml"), "--cache", str(tmp_path / "cache")]
    for _ in range(2):  # after its import, and at once when that is cached
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "stage.gguf.model: " in done.stderr and "tokenizer.json: expected no normalizer, or NFC" in done.stderr
        assert {path.name.partition("-")[0] for path in (tmp_path / "cache").glob("*/*-*")} == {"checkpoint"}


def of_folder(folder: Path, **fields: Any) -> ImportCheckpoint:
    return ImportCheckpoint.model_validate({"folder": ModelFolder(folder.name, folder.parent)} | fields)


def of_repo(**fields: Any) -> ImportCheckpoint:
    return ImportCheckpoint.model_validate({"repo": REPO} | fields)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_and_a_repository_of_it_become_the_same_checkpoint(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context], name: str
) -> None:
    commit = put(hub, published(name), pytorch_model__bin=b"pickle", modeling__py=b"import os", README__md=b"# Tiny")
    local, remote = make_context("local"), make_context("remote")
    facts = of_folder(published(name)).run(local)
    assert of_repo().run(remote) == {**facts, "repo": REPO, "revision": "main", "commit": commit}
    made = Checkpoint(local.work)
    assert made.digests() == Checkpoint(remote.work).digests()
    assert facts["parameters"] == sum(weight.numel() for weight in load_checkpoint(local.work).parameters())
    tokens = torch.arange(40)[None]
    wanted, found = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (published(name), made.folder)
    )
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, wanted(tokens).logits)
    asked = {request.rpartition("/")[2] for request in hub.requests}
    assert not asked & {"pytorch_model.bin", "modeling.py", "README.md", "model.safetensors.index.json"} - (
        {"model.safetensors.index.json"} if name == "llama-3" else set()
    )


def test_a_branch_is_pinned_to_its_commit_at_the_start_of_the_stage(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context]
) -> None:
    first = put(hub, published("llama-2"))
    hub.faults["model.safetensors"] = [HTTPStatus.SERVICE_UNAVAILABLE]
    context = make_context()
    with pytest.raises(InputError, match="run again to continue"):
        of_repo().run(context)
    put(hub, published("smollm"))
    assert of_repo().run(context)["commit"] == first
    assert of_repo(revision=first).run(make_context("old"))["commit"] == first
    assert of_repo().run(make_context("new"))["commit"] != first


def test_a_broken_download_continues_where_it_stopped(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context]
) -> None:
    put(hub, published("llama-2"))
    hub.faults["model.safetensors"] = [20_000, 30_000, HTTPStatus.SERVICE_UNAVAILABLE]
    context = make_context()
    with pytest.raises(InputError) as caught:
        of_repo().run(context)
    assert "model.safetensors cannot be downloaded" in str(caught.value)
    assert "503" in str(caught.value) and TOKEN not in str(caught.value)
    of_repo().run(context)
    weights = [request for request in hub.requests if "model.safetensors" in request]
    assert [request.partition(" bytes=")[2] for request in weights] == ["", "20000-", "50000-", "50000-"]
    assert len([request for request in hub.requests if request.endswith("/config.json")]) == 1
    assert Checkpoint(context.work).weights.exists()


def test_a_connection_without_data_is_given_up(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context]
) -> None:
    put(hub, published("llama-2"))
    hub.faults["config.json"] = [0, 0]
    with pytest.raises(InputError, match=r"config\.json cannot be downloaded from http://.*run again to continue"):
        of_repo().run(make_context())


def test_a_download_stops_on_request_and_continues_later(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context]
) -> None:
    put(hub, published("llama-2"))
    context = make_context(should_stop=lambda: any("model.safetensors" in request for request in hub.requests))
    with pytest.raises(Interrupted):
        of_repo().run(context)
    of_repo().run(make_context())
    assert len([request for request in hub.requests if request.endswith("/tokenizer.json")]) == 1


def test_damaged_downloads_are_discarded(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context]
) -> None:
    put(hub, published("llama-2"))
    context = make_context()
    part = context.scratch / "source" / "model.safetensors.part"
    part.parent.mkdir()
    part.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"model\.safetensors was damaged in transit; run again"):
        of_repo().run(context)
    of_repo().run(context)


def test_the_hub_is_not_contacted_once_everything_is_downloaded(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, published("llama-3"))
    context = make_context()
    facts = of_repo().run(context)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert of_repo().run(context) == facts


def test_files_that_the_hub_refuses_are_reported_with_the_cure(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaint(**fields: Any) -> str:
        with pytest.raises(InputError) as caught:
            of_repo(**fields).run(make_context(f"complaint-{len(hub.requests)}"))
        assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert complaint() == f"{REPO}: {hub.url} has no such model, or the token has no access"
    put(hub, published("llama-2"), gated=True)
    assert complaint(revision="v2") == f"{REPO}: {hub.url} has no revision 'v2' of this model"
    monkeypatch.delenv("HF_TOKEN")
    assert f"{REPO}: is gated, and it needs a token (HF_TOKEN, or `hf auth login`)" in complaint()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "revision 'main' cannot be downloaded from http://127.0.0.1:9 (ConnectError: " in complaint()


def test_a_private_model_is_read_with_the_token_and_no_file_holds_it(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    put(hub, published("llama-2"), private=True)
    of_repo().run(make_context())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_model_that_is_not_supported_is_refused_before_its_weights_are_fetched(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context]
) -> None:
    config = json.loads((published("llama-2") / "config.json").read_text())
    put(hub, published("llama-2"), config__json=json.dumps(config | {"model_type": "qwen3_moe"}).encode())
    with pytest.raises(InputError, match=r"config\.json: model_type: expected .*'llama'.*, got 'qwen3_moe'"):
        of_repo().run(make_context())
    assert not [request for request in hub.requests if "safetensors" in request]


def test_a_repository_of_pickles_is_refused(
    published: Callable[[str], Path], hub: Hub, make_context: Callable[..., Context]
) -> None:
    put(hub, published("llama-2"), pytorch_model__bin=b"pickle")
    del hub.repositories[REPO].at("main").files["model.safetensors"]
    with pytest.raises(InputError, match=rf"{REPO}@\w+: expected weights in .* got only pytorch_model\.bin, a pickle"):
        of_repo().run(make_context())
    assert not [request for request in hub.requests if "pytorch_model" in request]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ("", "stage.base: expected either folder or repo"),
        ('folder = "tiny"\nrepo = "a/b"', "stage.base: expected either folder or repo, got both"),
        ('folder = "tiny"\nrevision = "v2"', "stage.base: revision: expected a repo on the Hub beside it, got a folder"),
        ('folder = "tniy"', "stage.base.folder: expected a file, got nothing at"),
        ('repo = "tiny"', "stage.base.repo: expected "),
        ('repo = "a/b"\nrevison = "v2"', "did you mean 'revision'?"),
        ('folder = "tiny"\nchat_template = ""', "stage.base.chat_template"),
    ],
)
def test_contradictory_fields_are_faults_of_the_recipe(tmp_path: Path, fields: str, complaint: str) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    (tmp_path / "r.toml").write_text(f'name = "r"\n{BASE}{fields}\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.toml")
    assert complaint in str(caught.value)


def test_planning_does_not_contact_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "r.toml").write_text(f'name = "r"\n{BASE}repo = "{REPO}"\n')
    plan = Plan(load_recipe(tmp_path / "r.toml"), Store(tmp_path / "cache"))
    assert [entry.state for entry in plan] == ["run"]


def test_the_key_depends_on_the_content_of_the_folder_not_on_its_path(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    def key(folder: Path) -> str:
        return key_of(identity(of_folder(folder), artifacts={}, files=Store(tmp_path / "cache").digests.of_inputs))

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for path in published("llama-3").iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    assert key(tmp_path / "one") == key(tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("nobody reads this")
    assert key(tmp_path / "one") == key(tmp_path / "two")
    for changed in ("config.json", "tokenizer.json", "model-00002-of-00003.safetensors", "generation_config.json"):
        path = tmp_path / "two" / changed
        kept = path.read_bytes()
        path.write_bytes(kept + b" ")
        assert key(tmp_path / "one") != key(tmp_path / "two"), changed
        path.write_bytes(kept)


def test_a_resolved_recipe_means_the_same(published: Callable[[str], Path], tmp_path: Path) -> None:
    import tomli_w

    shutil.copytree(published("llama-2"), tmp_path / "llama-2")
    (tmp_path / "r.toml").write_text(f'name = "r"\n{BASE}folder = "llama-2"\n')
    recipe = load_recipe(tmp_path / "r.toml")
    (tmp_path / "again.toml").write_text(tomli_w.dumps(recipe.resolved()))
    again = load_recipe(tmp_path / "again.toml")
    assert again.resolved() == recipe.resolved()
    assert isinstance(again.stages["base"], ImportCheckpoint)
    # A worker is told the folder as the pattern that the parent has, and finds the same files.
    stage = ImportCheckpoint.model_validate({"folder": again.stages["base"].folder.pattern})
    assert stage.folder is not None
    assert stage.folder.matches() == sorted((tmp_path / "llama-2").iterdir())


def test_fields_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ValidationError, match="expected the path of a file, got int"):
        ImportCheckpoint.model_validate({"folder": 3})


@pytest.fixture
def rows(tmp_path: Path) -> InputFile:
    """Two questions and their answers, many times."""
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in ANSWERS.items()] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return InputFile("rows.jsonl", tmp_path)


def learning(rows: InputFile, **fields: Any) -> dict[str, Any]:
    return {
        "data": [{"files": rows}],
        "context": 128,
        "batch_tokens": 256,
        "budget": {"steps": 40},
        "schedule": {"learning_rate": 1e-2, "warmup_steps": 5},
        "seed": 1,
    } | fields


def test_it_is_fine_tuned_and_learns_to_stop_at_its_own_end_token(
    tmp_path: Path, rows: InputFile, make_context: Callable[..., Context]
) -> None:
    base = make_context("base")
    of_folder(llama_3(tmp_path / "llama")).run(base)
    tuned = make_context("tuned", inputs={"base": base.work})
    stage = FineTune.model_validate(learning(rows, model="base", budget={"steps": 120}))
    stage.prepare(tuned)
    stage.run(tuned)
    tokenizer = TextTokenizer.load(tuned.work)
    assert tokenizer.ends == TextTokenizer.load(base.work).ends and len(tokenizer.ends) == 2
    assert json.loads((tuned.work / "config.json").read_text())["rope_parameters"]["rope_type"] == "llama3"
    stock = AutoModelForCausalLM.from_pretrained(tuned.work)
    for prompt, response in ANSWERS.items():
        ids = tokenizer.encode_prompt([{"role": "user", "content": prompt}])
        found = stock.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=20, pad_token_id=0)
        assert tokenizer.decode(found[0, len(ids) :].tolist(), special=True) == f"{response}<|eot_id|>"


def test_an_adapter_of_it_is_trained_merged_and_evaluated(
    tmp_path: Path, rows: InputFile, make_context: Callable[..., Context]
) -> None:
    base = make_context("base")
    of_folder(llama_2(tmp_path / "llama", vocab_size=416)).run(base)  # an embedding with rows for no token
    lora = make_context("lora", inputs={"base": base.work})
    stage = TrainAdapter.model_validate(learning(rows, base="base", r=8, budget={"steps": 60}))
    stage.prepare(lora)
    stage.run(lora)
    records = {"base": {"digest": "b"}, "lora": {"inputs": {"base": {"digest": "b"}}}}
    merged = make_context("merged", inputs={"base": base.work, "lora": lora.work}, records=records)
    Merge.model_validate({"base": "base", "adapters": ["lora"]}).run(merged)
    assert json.loads((merged.work / "config.json").read_text())["vocab_size"] == 416
    tasks = [
        {"name": "organ", "task": "classification", "files": rows},
        {"name": "answers", "task": "answers", "files": rows, "max_new_tokens": 16},
        {"name": "text", "task": "text", "files": rows, "text": "response"},
    ]
    scores = make_context("scores", inputs={"merged": merged.work})
    found = Evaluate.model_validate({"model": "merged", "tasks": tasks}).run(scores)
    assert found["scores"]["organ.accuracy"] == 1
    assert found["scores"]["answers.chrf"] == 100
    assert found["tasks"]["answers"]["unended"] == 0


def test_an_answer_ends_at_any_of_the_models_end_tokens(
    tmp_path: Path, rows: InputFile, make_context: Callable[..., Context]
) -> None:
    base = make_context("base")
    of_folder(llama_3(tmp_path / "llama")).run(base)
    end = TextTokenizer.load(base.work).token_id("<|end_of_text|>")
    weights = load_file(base.work / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 100  # a channel that is positive whatever is read
    weights["lm_head.weight"].zero_()[end, 0] = 1  # and of which only this token is made
    save_file(weights, base.work / "model.safetensors")
    scores = make_context("scores", inputs={"base": base.work})
    task = {"name": "answers", "task": "answers", "files": rows, "max_new_tokens": 16}
    found = Evaluate.model_validate({"model": "base", "tasks": [task]}).run(scores)
    assert found["tasks"]["answers"]["unended"] == 0
    assert found["tasks"]["answers"]["new_tokens"] == len(ANSWERS) * 8  # one for each row: it ends at once


def test_planning_a_checkpoint_imports_no_slow_module() -> None:
    code = (
        "import sys, runner.stages.checkpoint\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""The kind `publish`: what is in a release, when a push is due, and what stock libraries make of the result."""

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_models
import pytest
from gguf import GGUFReader
from hub_server import OWNER, TOKEN, Hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import ValidationError
from random_model import random_model
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llm.errors import InputError
from llm.tokenizer.tokenizer import TextTokenizer
from runner.artifacts import Release
from runner.cache.store import digest_of
from runner.errors import StageError
from runner.hub.model_card import Model, languages_of, learned_from, model_card
from runner.hub.target import repository_name
from runner.input_files import InputFile
from runner.stage import Context, EffectContext
from runner.stages.checkpoint import ImportCheckpoint, ModelFolder
from runner.stages.gguf import WriteGguf
from runner.stages.publish import Publish
from runner.stages.sft import FineTune

# huggingface_hub 2.4 hands files to its HTTP client in a way that the client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RECIPE = """
name = "tiny-model"
description = "A model for tests."

[stage.corpus]
kind = "corpus"
sources = [{ files = "data/books.jsonl" }, { hub = "ada/web" }]

[stage.tokens]
kind = "pack"
context = 64

[stage.base]
kind = "pretrain"
tokens = "tokens"
architecture = { layers = 2, hidden_size = 16 }

[stage.chat]
kind = "sft"
data = [{ files = "data/chat.jsonl" }, { files = "data/other.jsonl", prompt = "Which section?\\n{text}" }]

[stage.before]
kind = "evaluate"
model = "base"
tasks = []

[stage.after]
kind = "evaluate"
model = "chat"
tasks = [{ name = "section", task = "classification", files = "data/test.jsonl" }]

[stage.gguf]
kind = "gguf"
model = "base"
precisions = ["f32", "q8_0"]

[stage.tuned]
kind = "lora"
base = "base"

[stage.parity]
kind = "parity"
model = "base"

[stage.publish]
kind = "publish"
"""
SCORES = {"before": {"section.macro_f1": 0.25}, "after": {"section.macro_f1": 0.9125, "general.bits_per_byte": 1.5}}


def record(kind: str, **metrics: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "key": kind * 4,
        "digest": "0123456789abcdef" * 4,
        "files": {"file": "f" * 64},
        "identity": {"fields": {"path": "/home/ada/secret", "sources": [{"files": {"content": [["jsonl", "e" * 64]]}}]}},
        "inputs": {},
        "seconds": 75.2,
        "versions": {"torch": "2.13.0"},
        "metrics": metrics,
    }


RECORDS = {
    "before": record("evaluate"),
    "base": record("pretrain", parameters=12345, trained_parameters=12345, tokens=4000, steps=20),
    "chat": record(
        "sft",
        data={
            "tables": [
                {"rows": 1013, "bad": 8, "unselected": 2, "dropped": 3, "licenses": {"MIT": 1000}, "origins": {"faq": 1000}},
                {"rows": 5, "bad": 0, "unselected": 0, "dropped": 0},
            ]
        },
    ),
    "after": record("evaluate", tasks={"section": {"rows": 833}}),
    "corpus": record(
        "corpus",
        sources={
            "source-1": {
                "train": 1200,
                "validation": 34,
                "licenses": {"CC0-1.0": 1200, "MIT": 34},
                "origins": {"x|y": 1234},
                "languages": {"en": 1234},
            },
            "ada/web": {
                "train": 9,
                "validation": 0,
                "licenses": {},
                "origins": {},
                "languages": {"zh": 9},
                "hub": "ada/web",
                "commit": "c",
            },
        },
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("checkpoint"), ["The heart pumps."], 280, seed=1)


@pytest.fixture
def context(checkpoint: Path, make_context: Callable[..., Context], tmp_path: Path) -> Context:
    for name, scores in SCORES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps({"scores": scores, "counts": {"section": 8}}))
    inputs = {"base": checkpoint, "before": tmp_path / "before", "after": tmp_path / "after"}
    return make_context(inputs=inputs, records=RECORDS, recipe=RECIPE)


@pytest.fixture
def whole(context: Context, make_context: Callable[..., Context], tmp_path: Path) -> Context:
    """With an adapter, GGUF files, curves, and what parity said."""
    for name, files in {
        "gguf": ["model-F32.gguf", "Modelfile"],
        "tuned": ["adapter_config.json"],
        "parity": ["parity.json"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(file)
    curves = {"loss": [[1, 5.0], [2, 4.0]]}
    base = {"base": {"kind": "pretrain", "key": "k", "digest": "b" * 64}}
    checks = [
        {"name": "Transformers: tokens", "passed": True, "told": "1,012 of 1,012 texts", "compared": 1012, "measured": {}},
        {"name": "llama.cpp f32", "passed": None, "told": "it is not installed here", "compared": 0, "measured": {}},
    ]
    records = RECORDS | {
        "base": RECORDS["base"] | {"digest": "b" * 64, "curves": curves},
        "gguf": record("gguf") | {"digest": "c" * 64, "inputs": base},
        "tuned": record("lora") | {"digest": "d" * 64, "inputs": base, "curves": curves},
    }
    compared = base | {"gguf": {"digest": "c" * 64}, "tuned": {"digest": "d" * 64}}
    records["parity"] = record("parity", checks=checks) | {"inputs": compared}
    inputs = {**context.inputs, **{name: tmp_path / name for name in ("gguf", "tuned", "parity")}}
    return make_context("whole", inputs=inputs, records=records, recipe=RECIPE)


def publish(**fields: Any) -> Publish:
    return Publish.model_validate({"model": "base", "scores": ["before", "after"], "license": "apache-2.0", **fields})


NAMES_THAT_THE_HUB_REFUSES = [
    *("a/b--c", "a/b..c", "a/.b", "a/b-", "-a/b", "a/b.git", "ä/b", "a/模型", "a/" + "b" * 97),
]
WHOLE = {"gguf": "gguf", "adapter": "tuned", "parity": "parity"}


def metadata(card: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    found: dict[str, Any] = ModelCard(card).data.to_dict()
    return found


def test_a_release_holds_the_checkpoint_byte_for_byte(context: Context, checkpoint: Path) -> None:
    publish().run(context)
    for path in checkpoint.iterdir():
        assert (context.work / path.name).read_bytes() == path.read_bytes()


def test_a_release_opens_in_transformers_and_generates_as_its_card_says(context: Context) -> None:
    publish().run(context)
    card = Release(context.work).card.read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace('path = "."', f"path = {str(context.work)!r}")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_the_card_has_the_metadata_of_the_hub(context: Context) -> None:
    publish().run(context)
    found = metadata(Release(context.work).card.read_text())
    assert found["license"] == "apache-2.0"
    assert found["language"] == ["en", "zh"]
    assert found["datasets"] == ["ada/web"]
    assert found["metrics"] == ["bits_per_byte", "f1"]
    (entry,) = found["model-index"]
    assert entry["name"] == "tiny-model"
    values = {metric["name"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert values == SCORES["after"]


def test_the_card_shows_scores_before_and_after_and_credits_the_data(context: Context) -> None:
    publish().run(context)
    card = Release(context.work).card.read_text()
    assert "| score | before | after |" in card
    assert "| section.macro_f1 | 0.25 | 0.9125 |" in card
    assert "| general.bits_per_byte |  | 1.5 |" in card
    assert r"| corpus | source-1: data/books.jsonl | 1,200 + 34 held out | CC0-1.0 (1,200), MIT (34) | x\|y (1,234) |" in card
    assert "| corpus | [ada/web](https://huggingface.co/datasets/ada/web) | 9 | not stated | not stated |" in card
    assert "| chat | data/chat.jsonl | 1,000 | MIT (1,000) | faq (1,000) |" in card
    assert "| chat | data/other.jsonl | 5 | not stated | not stated |" in card
    work = "12,345 parameters learned from 4,000 tokens in 20 steps"
    assert f"| base | pretrain | {work} | 1 min 15 s | `0123456789ab` |" in card
    assert "run recipe.toml" in card


def test_the_card_describes_the_model_its_scores_and_its_prompt(context: Context) -> None:
    publish().run(context)
    card = Release(context.work).card.read_text()
    assert "from nothing: 12,345 parameters, 2 layers, hidden size 16, a context of 64 tokens." in card
    assert "`before` scores what the stage `base` made. `after` scores what the stage `chat` made." in card
    assert "| section | classification | data/test.jsonl | 833 |" in card
    assert card.count("it was taught this prompt") == 1
    assert "```\nWhich section?\n{text}\n```" in card


def test_stages_are_listed_in_the_order_of_the_recipe(context: Context) -> None:
    publish().run(context)
    lines = Release(context.work).card.read_text().splitlines()
    told = [line.split(" | ")[0].removeprefix("| ") for line in lines if "| `0123456789ab` |" in line]
    assert told == ["corpus", "base", "chat", "before", "after"]
    assert list(json.loads(Release(context.work).lock.read_text())["stages"]) == sorted(told)


def test_recipe_scores_and_lock_file_are_beside_the_weights(context: Context) -> None:
    publish().run(context)
    release = Release(context.work)
    assert tomllib.loads(release.recipe.read_text()) == tomllib.loads(RECIPE)
    assert {name: scores["scores"] for name, scores in json.loads(release.scores.read_text()).items()} == SCORES
    lock = json.loads(release.lock.read_text())
    assert lock["stages"]["base"]["versions"] == {"torch": "2.13.0"}
    assert lock["stages"]["base"]["digest"] == RECORDS["base"]["digest"]
    assert "secret" not in release.lock.read_text()


def test_the_lock_file_holds_digests_of_the_data(context: Context) -> None:
    files = {"sources[0].files": {"data/text.jsonl": "e" * 64}}
    publish().run(dataclasses.replace(context, data={"corpus": files}))
    lock = json.loads(Release(context.work).lock.read_text())
    assert lock["stages"]["corpus"]["data"] == files


def test_gguf_files_adapter_curves_and_parity_are_beside_the_weights(whole: Context) -> None:
    publish(**WHOLE).run(whole)
    release = Release(whole.work)
    assert (release.folder / "model-F32.gguf").read_text() == "model-F32.gguf"
    assert (release.folder / "Modelfile").exists()
    assert release.adapter.config.exists()
    assert release.parity.read_text() == "parity.json"
    assert release.curves.read_bytes().startswith(b"\x89PNG")
    assert "curves.png" not in release.digests()


def test_the_card_explains_formats_and_comparisons_and_shows_curves(whole: Context) -> None:
    publish(**WHOLE).run(whole)
    card = Release(whole.work).card.read_text()
    assert "llama-cli -m model-F32.gguf" in card
    assert "ollama create my-model -f Modelfile" in card
    assert "Its base is the model of this repository:" in card
    assert 'PeftModel.from_pretrained(base, ".", subfolder="adapter")' in card
    assert "| Transformers: tokens | equal | 1,012 of 1,012 texts |" in card
    assert "| llama.cpp f32 | not checked | it is not installed here |" in card
    assert "](curves.png)" in card
    assert metadata(card)["tags"] == ["stockpot", "gguf", "lora"]


def test_files_of_another_model_are_not_released(whole: Context, make_context: Callable[..., Context]) -> None:
    for stage, message in (
        ("gguf", "expected files of 'base', got those of another model from 'gguf'"),
        ("parity", "expected a comparison of 'base', got none in 'parity'"),
    ):
        other = {name: dict(one) for name, one in whole.records.items()}
        other[stage]["inputs"] = {"base": {"digest": "f" * 64}}
        context = make_context("other", inputs=whole.inputs, records=other, recipe=RECIPE)
        with pytest.raises(InputError, match=message):
            publish(**WHOLE).run(context)


def test_card_and_lock_file_are_not_in_the_digest_of_a_release(context: Context, make_context: Callable[..., Context]) -> None:
    publish().run(context)
    slower = {name: {**one, "seconds": 99.0, "versions": {"torch": "2.12"}} for name, one in RECORDS.items()}
    other = make_context("other", inputs=context.inputs, records=slower, recipe=RECIPE)
    publish().run(other)
    first, second = Release(context.work), Release(other.work)
    assert first.card.read_text() != second.card.read_text()
    assert first.digests() == second.digests()


def test_a_model_that_was_made_elsewhere_is_credited() -> None:
    recipe = {"name": "m", "stage": {"base": {"kind": "checkpoint"}, "chat": {"kind": "sft", "data": [{"files": "a"}]}}}
    rows = {"tables": [{"rows": 3, "bad": 0, "unselected": 0, "dropped": 0}]}
    records = {"base": record("checkpoint", repo="ada/small", commit="c" * 40), "chat": record("sft", data=rows)}
    card = model_card(Model(recipe, records, scores={}, license="mit", languages=["en"], version="1"))
    assert metadata(card)["base_model"] == ["ada/small"]
    assert "Adapted from [ada/small](https://huggingface.co/ada/small), commit `cccccccccccc`." in card
    assert "It knows nothing but this" not in card and "trained from nothing" not in card


def test_a_local_base_is_credited_by_its_name_and_licence(make_context: Callable[..., Context], context: Context) -> None:
    base = '[stage.base]\nkind = "checkpoint"\nfolder = "smol"\nmodel_id = "ada/smol"\nlicense = "apache-2.0"\n'
    recipe = RECIPE[: RECIPE.index("[stage.base]")] + base + RECIPE[RECIPE.index("[stage.chat]") :]
    records = {**RECORDS, "base": record("checkpoint")}
    for number, (wanted, told) in enumerate(
        [
            ({"license": None}, "which is under apache-2.0."),
            ({"license": "apache-2.0"}, "which is under apache-2.0."),
            (
                {"license": "mit"},
                "which is under apache-2.0, this release under mit: whether that is allowed is for its makers to say.",
            ),
        ]
    ):
        here = make_context(f"local-{number}", inputs=context.inputs, records=records, recipe=recipe)
        publish(**wanted).run(here)
        card = (here.work / "README.md").read_text()
        assert f"Adapted from [ada/smol](https://huggingface.co/ada/smol), {told}" in card
        assert metadata(card)["base_model"] == ["ada/smol"]
        assert metadata(card)["license"] == (wanted["license"] or "apache-2.0")


def test_rows_that_a_training_did_not_reach_are_not_listed_as_learned() -> None:
    tables = [{"rows": 1000, "bad": 0, "unselected": 0, "dropped": 0, "learned_tokens": 50_000}]
    mixed = {"rows": 40_000, "bad": 0, "dropped": 0, "licenses": {}, "origins": {}, "learned_tokens": 4_000_000}
    fields = {"data": [{"files": "own.jsonl"}], "mix": [{"files": "general.jsonl"}, {"files": "rare.jsonl"}]}
    metrics = {
        "tokens": 40_000,
        "data": {"tables": tables},
        "mix": [{"share": 0.2, "table": mixed}, {"share": 1e-6, "table": mixed}],
    }
    rows = [line[1:3] for line in learned_from("tuned", record("lora", **metrics), fields)]
    assert rows == [["own.jsonl", "about 640 of 1,000"], ["general.jsonl", "about 80 of 40,000"]]
    metrics["tokens"] = 10**9
    rows = [line[2] for line in learned_from("tuned", record("lora", **metrics), fields)]
    assert rows == ["1,000", "40,000", "about 10 of 40,000"]


@pytest.mark.parametrize("code", ["English", "Python", "py", "EN", "zh-CN", "", "e n"])
def test_a_language_that_the_hub_refuses_is_refused_before_training(code: str) -> None:
    with pytest.raises(ValidationError, match="expected an ISO 639 code that the Hub takes"):
        publish(languages=["en", code])
    assert publish(languages=["en", "zh", "yue", "code", "multilingual"]).languages


def test_languages_of_rows_that_the_hub_refuses_are_left_off_the_card() -> None:
    counts = {"English": 9, "zh-CN": 5, "en": 4, "zh": 3, "Python": 2, "pt_BR": 1}
    assert languages_of([record("corpus", sources={"s": {"languages": counts}})]) == ["zh", "en", "pt"]


def test_a_release_without_scores_has_a_valid_card(context: Context) -> None:
    publish(scores=[], languages=["de"]).run(context)
    found = metadata(Release(context.work).card.read_text())
    assert found["language"] == ["de"]
    assert "model-index" not in found
    assert "## Scores" not in Release(context.work).card.read_text()


def test_a_second_run_in_the_same_folder_gives_the_same_release(context: Context) -> None:
    publish().run(context)
    before = Release(context.work).digests()
    publish().run(context)
    assert Release(context.work).digests() == before


def test_nothing_is_pushed_unless_the_recipe_names_a_repository(context: Context, tmp_path: Path) -> None:
    assert publish().effect(context.work, digest="d", receipts=tmp_path) is None


def test_without_a_token_the_effect_says_how_to_push(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    effect = publish(repo="tiny").effect(context.work, digest="d", receipts=tmp_path)
    assert effect is not None
    assert effect.act is None
    assert "set HF_TOKEN" in effect.sentence


def test_a_release_is_pushed_once_and_opens_from_the_hub(hub: Hub, context: Context, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stage = publish(repo="tiny", private=False)
    stage.run(context)
    digest = digest_of(Release(context.work).digests())
    (context.work / "record.json").write_text("{}")
    (context.work / "metrics.jsonl").write_text("")
    (context.scratch / "job.json").write_text("{}")
    effect = stage.effect(context.work, digest=digest, receipts=tmp_path / "receipts")
    assert effect is not None
    assert effect.act is not None
    assert TOKEN not in effect.sentence + effect.act(EffectContext())
    assert stage.effect(context.work, digest=digest, receipts=tmp_path / "receipts") is None

    pushed = hub.repositories[f"{OWNER}/tiny"].at("main")
    assert pushed is not None
    assert set(pushed.files) == {".gitattributes"} | {
        path.name for path in context.work.iterdir() if path.is_file() and path.name not in ("record.json", "metrics.jsonl")
    }
    from huggingface_hub import snapshot_download

    folder = snapshot_download(f"{OWNER}/tiny", endpoint=hub.url, cache_dir=tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = model.generate(**tokenizer("The heart", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
    assert output.shape[1] >= 5


def test_a_release_names_every_end_of_a_base_whose_own_end_is_not_that_of_the_chat(
    make_context: Callable[..., Context], tmp_path: Path
) -> None:
    """As in Qwen and Gemma: documents end with one token, answers with another."""
    source = foreign_models.smollm(tmp_path / "source")
    number = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id("<|endoftext|>")
    for file in ("tokenizer_config.json", "config.json", "generation_config.json"):
        fields = json.loads((source / file).read_text())
        end = {"eos_token": "<|endoftext|>"} if file == "tokenizer_config.json" else {"eos_token_id": number}
        (source / file).write_text(json.dumps(fields | end))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the heart", "response": "pumps"}) + "\n")
    base = make_context("imported")
    ImportCheckpoint.model_validate({"folder": ModelFolder("source", tmp_path)}).run(base)
    tuned = make_context("tuned", inputs={"imported": base.work})
    data = [{"files": InputFile("rows.jsonl", tmp_path)}]
    sizes = {"context": 64, "batch_tokens": 64, "budget": {"steps": 1}, "schedule": {"learning_rate": 1e-3}, "seed": 1}
    stage = FineTune.model_validate({"model": "imported", "data": data, **sizes})
    stage.prepare(tuned)
    stage.run(tuned)
    gguf = make_context("gguf", inputs={"tuned": tuned.work})
    WriteGguf.model_validate({"model": "tuned"}).run(gguf)
    records = {"tuned": RECORDS["chat"], "gguf": record("gguf") | {"inputs": {"tuned": RECORDS["chat"]}}}
    inputs = {"tuned": tuned.work, "gguf": gguf.work}
    release = make_context("release", inputs=inputs, records=records, recipe=RECIPE.replace("tuned", "other"))
    publish(model="tuned", scores=[], gguf="gguf").run(release)

    tokenizer = TextTokenizer.load(release.work)
    ends = [tokenizer.token_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert list(tokenizer.ends) == ends
    for file in ("config.json", "generation_config.json"):
        assert json.loads((release.work / file).read_text())["eos_token_id"] == ends
    assert AutoTokenizer.from_pretrained(release.work).eos_token == "<|endoftext|>"
    named = json.loads((release.work / "tokenizer_config.json").read_text())
    assert [named["eos_token"], *named["extra_special_tokens"].values()] == ["<|endoftext|>", "<|im_end|>"]
    found = GGUFReader(next(release.work.rglob("*.gguf"))).fields
    assert [found[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")] == ends
    lines = next(release.work.rglob("Modelfile")).read_text().splitlines()
    assert [line for line in lines if "stop" in line] == ['PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|im_end|>"']


def test_a_failed_push_is_repeated(hub: Hub, context: Context, tmp_path: Path) -> None:
    stage = publish(repo="somebody-else/tiny")
    stage.run(context)
    for _ in range(2):
        effect = stage.effect(context.work, digest="d" * 64, receipts=tmp_path / "receipts")
        assert effect is not None
        assert effect.act is not None
        with pytest.raises(StageError):
            effect.act(EffectContext())


@pytest.mark.parametrize("repo", [*NAMES_THAT_THE_HUB_REFUSES, "a/b/c", "", "a b", "/a", "a/"])
def test_a_repository_is_a_name_or_owner_and_name(repo: str) -> None:
    with pytest.raises(ValueError, match=r'repo\n.*expected "owner/name" or "name" as the Hub takes it'):
        publish(repo=repo)


@pytest.mark.parametrize("repo", [*NAMES_THAT_THE_HUB_REFUSES, "a-b/C_d.e-0", "model", "a/" + "b" * 96])
def test_a_name_is_refused_where_the_client_of_the_hub_refuses_it(repo: str) -> None:
    ours = theirs = True
    try:
        repository_name(repo)
    except ValueError:
        ours = False
    try:
        validate_repo_id(repo)
    except HFValidationError:
        theirs = False
    assert ours == (theirs and repo.isascii())  # the Hub itself takes no other letters

"""End to end: the shipped quickstart with less training, run as a user runs it, and its results; in full as a long test."""

import contextlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_cache import unnoticed

from runner.cli import main

SHIPPED = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
RECIPE = Path(__file__).parent / "support" / "short_quickstart.toml"  # which extends it
STAGES = [
    "corpus",
    "tokenizer",
    "tokens",
    "base-trunk",
    "base",
    "chat",
    "medical",
    "release",
    "before",
    "after",
    "gguf",
    "parity",
    "publish",
]


SECRETS = {
    "HF_TOKEN": "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",
    "AWS_ACCESS_KEY_ID": "AKIAZQ3EXAMPLEKEY777",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI+K7MDENG+bPxRfiCYEXAMPLEKEY",
}


def run(cache: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(cache, *words), capture_output=True, text=True, env={**os.environ, **environment})


def call(cache: Path, *words: str) -> tuple[int, str, str]:
    """Exit code and output of a command that only reads the cache, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        code = main([*words, "--cache", str(cache)])
    return code, out.getvalue(), error.getvalue()


def command(cache: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "runner.cli", *words, "--cache", str(cache)]


def states(cache: Path, *options: str) -> dict[str, str]:
    plan = json.loads(call(cache, "plan", str(RECIPE), "--json", *options)[1])
    return {stage["name"]: stage["state"] for stage in plan["stages"]}


@pytest.fixture(scope="module", autouse=True)
def _may_extend_the_shipped_recipe() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOCKPOT_ALLOW_PATH", str(SHIPPED.parent))
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the quickstart is finished."""
    folder = tmp_path_factory.mktemp("cache")
    done = run(folder, "run", str(RECIPE), **SECRETS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def artifact(cache: Path) -> Callable[[str], Path]:
    """The folder of the artifact of a stage."""
    return lambda stage: Path(call(cache, "path", str(RECIPE), stage)[1].strip())


@pytest.mark.long
def test_the_shipped_quickstart_in_full_has_the_score_that_it_names(tmp_path: Path) -> None:
    done = run(tmp_path, "run", str(SHIPPED))
    assert done.returncode == 0, done.stderr
    folder = Path(call(tmp_path, "path", str(SHIPPED), "after")[1].strip())
    reached = json.loads((folder / "scores.json").read_text())["scores"]["section.macro_f1"]
    promised = re.search(r"^# Result: macro-F1 over 8 sections (\S+)", SHIPPED.read_text(encoding="utf-8"), re.MULTILINE)
    assert promised and reached > float(promised[1]) - 0.06


def test_everything_is_cached_afterwards(cache: Path) -> None:
    assert states(cache) == dict.fromkeys(STAGES, "cached")


def test_a_run_ends_with_its_scores_the_folder_of_the_model_and_the_next_commands(
    cache: Path, artifact: Callable[[str], Path]
) -> None:
    done = run(cache, str(RECIPE), "--set", "description='with a space'")
    assert done.returncode == 0, done.stderr
    _, scores, ending = done.stderr.split("\n\n")
    assert [line.split()[0] for line in scores.splitlines()][:3] == ["score", "section.accuracy", "section.macro_f1"]
    place, *commands = ending.splitlines()
    assert place == f"release: the model is in {artifact('release')}"
    rest = shlex.join([str(RECIPE), "--set", "description='with a space'", "--cache", str(cache)])
    recipe, _, others = rest.partition(" ")
    predict = f"  run predict {recipe} new.csv --out labelled.csv {others}"
    assert commands == [predict, *(f"  run {command} {rest}" for command in ("chat", "report", "serve"))]


def test_no_secret_of_the_environment_is_in_the_cache_the_logs_aim_or_the_release(cache: Path) -> None:
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert {"logs", "aim", "stages", "records"} <= {path.relative_to(cache).parts[0] for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_one_flipped_bit_in_any_file_of_any_stage_is_found_and_named(cache: Path, tmp_path: Path) -> None:
    """Flips a bit in one file of every artifact at a time, until each file has been flipped once."""
    folder = tmp_path / "cache"
    shutil.copytree(cache / "records", folder / "records")
    files = {
        path.name: sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
        for path in (cache / "stages").iterdir()
    }
    generator = random.Random(0)
    for turn in range(max(map(len, files.values()))):
        shutil.rmtree(folder / "stages", ignore_errors=True)
        shutil.copytree(cache / "stages", folder / "stages")
        flipped = [paths[turn].relative_to(cache / "stages") for paths in files.values() if turn < len(paths)]
        for name in flipped:
            content = bytearray((folder / "stages" / name).read_bytes())
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            (folder / "stages" / name).write_bytes(content)
        code, _, error = call(folder, "verify")
        assert code == 3
        for name in flipped:
            assert f"{name.parts[0]}: {name.relative_to(name.parts[0])}: expected " in error
        assert f"{len(flipped)} files are damaged" in error


def _flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        middle = path.stat().st_size // 2
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 1]))


def test_damage_that_the_memo_of_digests_does_not_know_is_found_and_rebuilt(
    cache: Path, artifact: Callable[[str], Path]
) -> None:
    """The merged model and its scores are damaged; what reads them is made again."""
    digests = [digest_of(cache, [str(RECIPE), "--until", stage]) for stage in ("release", "after", "publish")]
    for path in (artifact("release") / "model.safetensors", artifact("after") / "scores.json"):
        path.chmod(0o644)
        unnoticed(cache, path, _flip_a_bit)
    done = run(cache, "run", str(RECIPE), "--force", "publish")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("does not match its record") == 2
    assert [digest_of(cache, [str(RECIPE), "--until", stage]) for stage in ("release", "after", "publish")] == digests


def test_the_adapter_improves_the_scores(artifact: Callable[[str], Path]) -> None:
    before, after = (json.loads((artifact(stage) / "scores.json").read_text())["scores"] for stage in ("before", "after"))
    assert after["section.macro_f1"] > before["section.macro_f1"] + 0.3
    assert after["section.macro_f1"] > 0.5


@pytest.mark.parametrize("stage", ["base", "chat", "release"])
@torch.no_grad()
def test_stock_transformers_gives_the_logits_of_the_hand_written_model(artifact: Callable[[str], Path], stage: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm.models.checkpoint import load_checkpoint

    stock, ours = AutoModelForCausalLM.from_pretrained(artifact(stage)), load_checkpoint(artifact(stage))
    text = "Which section is this from? Most people with the condition have 药 pain."
    tokens = AutoTokenizer.from_pretrained(artifact(stage))(text, return_tensors="pt").input_ids
    torch.testing.assert_close(stock(tokens).logits, ours(tokens), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_stock_peft_opens_the_adapter_and_the_merged_model_equals_base_plus_adapter(artifact: Callable[[str], Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(artifact("chat"))
    adapted = PeftModel.from_pretrained(base, artifact("medical"))
    merged = AutoModelForCausalLM.from_pretrained(artifact("release"))
    tokens = torch.arange(100, 200)[None]
    torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=0)


def test_the_release_holds_card_recipe_lock_and_scores(artifact: Callable[[str], Path]) -> None:
    names = {path.name for path in artifact("publish").iterdir()}
    assert {"README.md", "recipe.toml", "recipe.lock.json", "scores.json", "model.safetensors", "tokenizer.json"} <= names


def test_another_rank_reruns_the_adapter_and_the_stages_after_it(cache: Path) -> None:
    changed = states(cache, "--set", "stage.medical.r=4")
    assert [name for name, state in changed.items() if state == "run"] == ["medical"]
    waiting = ["release", "after", "gguf", "parity", "publish"]
    assert [name for name, state in changed.items() if state == "waiting"] == waiting


def test_a_gate_that_fails_blocks_the_release_and_exits_with_4(cache: Path) -> None:
    gates = ["--set", "stage.after.gates=[{score='section.macro_f1',at_least=0.9999}]"]
    assert states(cache, *gates)["publish"] == "skipped"
    done = run(cache, "run", str(RECIPE), *gates)
    assert done.returncode == 4
    assert "section.macro_f1" in done.stderr and "skipped because of it: publish" in done.stderr


@pytest.mark.long
def test_an_adapter_training_that_is_killed_ends_like_an_uninterrupted_one(cache: Path) -> None:
    done = run(cache, "prove-resume", str(RECIPE), "medical", "--steps", "8", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    proof = json.loads(done.stdout)
    assert proof["equal"] and proof["kind"] == "lora"
    assert "ended bit for bit like an uninterrupted training" in call(cache, "why", str(RECIPE), "medical")[1]


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("after", "evaluate"),
        pytest.param("release", "merge", marks=pytest.mark.long),
        pytest.param("publish", "publish", marks=pytest.mark.long),
    ],
)
def test_a_stage_that_was_killed_ends_with_the_same_digest(cache: Path, stage: str, kind: str) -> None:
    options = [str(RECIPE), "--until", stage]
    before = digest_of(cache, options)
    process = subprocess.Popen(command(cache, "run", *options, "--force", stage), stderr=subprocess.DEVNULL)
    while not list(cache.glob(f"work/{kind}-*/.work/job.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(cache, "run", *options)
    assert done.returncode == 0, done.stderr
    assert digest_of(cache, options) == before


def digest_of(cache: Path, options: list[str]) -> str:
    recipe, _, stage, *overrides = options
    folder = call(cache, "path", recipe, stage, *overrides)[1].strip()
    return str(json.loads((Path(folder) / "record.json").read_text())["digest"])


def test_two_processes_train_and_another_count_reruns_nothing(cache: Path) -> None:
    options = [str(RECIPE), "--until", "base", "--set", "stage.base.budget={steps=12}", "--processes", "2"]
    options += ["--set", 'parallel.strategy="fsdp"']
    done = run(cache, "run", *options)
    assert done.returncode == 0, done.stderr
    assert states(cache, *options[1:5])["base"] == "cached"
    (record,) = [record for record in records(cache) if record["kind"] == "pretrain" and record["metrics"]["steps"] == 12]
    assert record["processes"] == 2
    choices = record["metrics"]["choices"]
    assert (choices["processes"], choices["strategy"]) == (2, "fsdp")
    folder = Path(run(cache, "path", str(RECIPE), "base", *options[3:5]).stdout.strip())
    (weights,) = folder.rglob("*.safetensors")
    numbers = sum(tensor.numel() for tensor in load_file(weights).values())
    assert numbers == record["metrics"]["parameters"]  # all of them in one file


def records(cache: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in (cache / "records").glob("*.json")]


def test_the_curves_are_in_aim(cache: Path) -> None:
    code = f"""
from aim import Repo
curves = {{}}
for run in Repo({str(cache / "aim")!r}).iter_runs():
    curves.setdefault(run["stage"], set()).update(metric.name for metric in run.metrics())
for stage in ("base", "chat", "medical"):
    assert {{"loss", "learning_rate", "tokens_per_second"}} <= curves[stage], curves
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_report_is_one_page_that_loads_nothing_and_shows_everything(cache: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert run(cache, "report", str(RECIPE), "--out", str(page)).returncode == 0
    text = page.read_text(encoding="utf-8")
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)([^"']+)""", text)
    assert outside == [], "nothing is loaded from elsewhere"
    for part in ("section.macro_f1", "gradient norm", "tokens/s", "bytes per token", "CC-BY-4.0", "peak memory"):
        assert part in text, part
    assert run(cache, "report", str(RECIPE), "--out", str(tmp_path / "report.md")).returncode == 0
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| section.macro_f1 |" in page and "\nfinished; " in page
    assert re.search(r"^\* after: section.macro_f1 = .*: passed$", page, re.MULTILINE)

"""How much memory a checkpoint takes where it is adopted, digested, evaluated and merged: little more than its own size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_release import tiny_checkpoint

from llm.adapters import lora
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from runner.engine.launch import MEMORY

MOST = 1.3  # of the size of the checkpoint
CHILD = """
import json, re, sys
from pathlib import Path
import peft, torch
from llm.adapters import lora
from llm.adapters.merge import MergedWeights
from llm.device import return_freed_blocks
from llm.evaluation.scoring import score_texts
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer
from runner.artifacts import Checkpoint

folder = Path(sys.argv[1])
base = folder / "base"

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def evaluate(dtype):
    model = load_checkpoint(base, dtype=dtype)
    score_texts(model, TextTokenizer.load(base), texts=["The heart pumps blood."] * 4, progress=lambda done, total: None)

def merge():
    return_freed_blocks()
    merged = MergedWeights(base, [folder / "adapter"])
    save_checkpoint(folder / "merged", merged.model, base, dtype=torch.bfloat16, read=merged)

steps = {
    "adopt": lambda: import_checkpoint(inspect_checkpoint(base), folder / "adopted"),
    "digest": lambda: Checkpoint(base).digests(),
    "merge": merge,
    "evaluate": lambda: evaluate(torch.bfloat16),
}
torch.set_num_threads(1)
tiny = Decoder(DecoderConfig(hidden_size=8, layers=1, heads=1, context=8), vocab_size=9)
lora.attach(tiny, lora.LoraConfig(r=1, alpha=1), seed=0)  # imports what it needs
found = {}
for name, step in steps.items():
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    found[name] = status("VmHWM") - before
print(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs the peak of a process, as Linux tells it")
def test_a_checkpoint_is_adopted_digested_merged_and_evaluated_in_little_more_than_its_own_size(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", hidden_size=512, layers=28, heads=8, kv_heads=8)
    model = load_checkpoint(folder)
    save_checkpoint(folder, model, folder, dtype=torch.bfloat16)
    lora.attach(model, lora.LoraConfig(r=4, alpha=8), seed=0)
    lora.save_adapter(tmp_path / "adapter", model)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 100e6
    as_in_a_run = {**os.environ, **MEMORY}
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, env=as_in_a_run)
    assert done.returncode == 0, done.stderr
    found = {name: taken / size for name, taken in json.loads(done.stdout).items()}
    assert {name: share for name, share in found.items() if share > MOST} == {}, found
    assert (tmp_path / "adopted" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

"""GGUF files opened in unpatched llama.cpp. test_parity has the faults that parity checks must find."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import foreign_models
import pytest
import tiny_release
import torch
from tiny_release import PROMPTS, TEXTS, open_in_llama_cpp, tiny_checkpoint

from llm.errors import InputError
from llm.export import GgufPrecision
from llm.export.gguf import write_gguf
from llm.export.parity import PROBES
from llm.inference.generate import generate
from llm.models import architectures
from llm.models.checkpoint import load_checkpoint
from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
from llm.tokenizer.pretokenizers import PreTokenizerName
from llm.tokenizer.tokenizer import TextTokenizer


@pytest.mark.parametrize("architecture", architectures())
def test_llama_cpp_gives_the_log_probabilities_and_greedy_answers_of_every_architecture(
    architecture: str, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", architecture=architecture)
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    model, tokenizer = load_checkpoint(checkpoint), TextTokenizer.load(checkpoint)
    stranger = open_in_llama_cpp(tmp_path / "model.gguf", checkpoint)
    prompts = [tokenizer.encode_prompt(chat) for chat in PROMPTS]
    with torch.inference_mode():
        for prompt in prompts:
            ours = model(torch.tensor([prompt]))[0, -1:].log_softmax(-1)
            # A GELU comes from a table in fp16 there: what one number in fp16 is rounded by.
            limit = 1e-4 if model.exact_in_llama_cpp else 2**-11 * float(ours.abs().max())
            torch.testing.assert_close(stranger.log_probabilities(prompt), ours, atol=limit, rtol=0)
    answers = generate(model, prompts, max_new_tokens=20, end=tokenizer.ends)
    assert stranger.answers(prompts, max_new_tokens=20) == answers


@pytest.mark.parametrize(("precision", "bits", "moved"), [("f16", 16, 1e-3), ("bf16", 16, 1e-2), ("q8_0", 8.5, 2e-2)])
def test_fewer_bits_make_a_smaller_file_and_nearly_the_same_probabilities(
    precision: GgufPrecision, bits: float, moved: float, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    facts = write_gguf(checkpoint, tmp_path / "small.gguf", precision=precision)
    full = write_gguf(checkpoint, tmp_path / "full.gguf", precision="f32")
    assert facts["tensors"] == {precision: 15, "f32": 5}  # norms stay in f32
    saved = full["bytes"] - facts["bytes"]
    matrices = sum(weight.numel() for weight in load_checkpoint(checkpoint).state_dict().values() if weight.dim() == 2)
    matrices -= load_checkpoint(checkpoint).lm_head.weight.numel()  # it is the embedding
    assert saved == pytest.approx(matrices * (32 - bits) / 8, rel=0.01)
    model, tokenizer = load_checkpoint(checkpoint), TextTokenizer.load(checkpoint)
    stranger = open_in_llama_cpp(tmp_path / "small.gguf", checkpoint)
    for prompt in map(tokenizer.encode_prompt, PROMPTS):
        with torch.inference_mode():
            ours = model(torch.tensor([prompt]))[0, -1:].softmax(-1)
        assert (stranger.log_probabilities(prompt).exp() - ours).abs().sum() / 2 < moved


@pytest.mark.parametrize(("precision", "bits"), [("q5_1", 6), ("q5_0", 5.5), ("q4_1", 5), ("q4_0", 4.5)])
def test_below_8_bits_the_embedding_stays_in_8_and_llama_cpp_computes_with_these_weights(
    precision: GgufPrecision, bits: float, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    facts = write_gguf(checkpoint, tmp_path / "small.gguf", precision=precision)
    assert facts["tensors"] == {precision: 14, "q8_0": 1, "f32": 5}
    full = write_gguf(checkpoint, tmp_path / "full.gguf", precision="q8_0")
    model = load_checkpoint(checkpoint)
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2 and "layers" in name)
    assert full["bytes"] - facts["bytes"] == pytest.approx(matrices * (8.5 - bits) / 8, rel=0.01)
    stranger = open_in_llama_cpp(tmp_path / "small.gguf", checkpoint)
    moved = []
    for prompt in map(TextTokenizer.load(checkpoint).encode_prompt, PROMPTS):
        with torch.inference_mode():
            ours = model(torch.tensor([prompt]))[0, -1:].softmax(-1)
        moved.append(float((stranger.log_probabilities(prompt).exp() - ours).abs().sum() / 2))
    assert max(moved) < 0.3  # of a random model, whose every channel matters


def test_rows_that_are_not_whole_blocks_stay_in_f16(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", intermediate_size=72)
    facts = write_gguf(checkpoint, tmp_path / "model.gguf", precision="q8_0")
    assert facts["tensors"] == {"q8_0": 13, "f16": 2, "f32": 5}  # the two matrices that read the feed-forward layer
    assert open_in_llama_cpp(tmp_path / "model.gguf", checkpoint).encode("heart")


@pytest.mark.parametrize("name", get_args(PreTokenizerName))
def test_llama_cpp_splits_text_as_each_tokenizer_does(name: PreTokenizerName, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", pre_tokenizer=name)
    assert write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")["pre_tokenizer"] == name
    tokenizer, stranger = TextTokenizer.load(checkpoint), open_in_llama_cpp(tmp_path / "model.gguf", checkpoint)
    for text in [*TEXTS, *PROBES, "<|end|> is text here"]:
        assert stranger.encode(text) == tokenizer.encode(text), text


def test_llama_cpp_renders_chats_as_they_were_trained(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    tokenizer, stranger = TextTokenizer.load(checkpoint), open_in_llama_cpp(tmp_path / "model.gguf", checkpoint)
    for chat in PROMPTS:
        assert stranger.encode_prompt(chat) == tokenizer.encode_prompt(chat)


@pytest.mark.parametrize("family", foreign_models.FAMILIES)
def test_imported_models_are_written_with_their_own_tokenizers_and_rotary_scaling(family: str, tmp_path: Path) -> None:
    import_checkpoint(inspect_checkpoint(foreign_models.FAMILIES[family](tmp_path / "source")), tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", precision="f32")
    model, tokenizer = load_checkpoint(tmp_path / "model"), TextTokenizer.load(tmp_path / "model")
    stranger = open_in_llama_cpp(tmp_path / "model.gguf", tmp_path / "model")
    for text in [*TEXTS, *PROBES]:
        assert stranger.encode(text) == tokenizer.encode(text), text
    prompt = (tokenizer.encode_prompt(PROMPTS[0]) * 9)[:100]  # past the original context of the llama3 scaling
    with torch.inference_mode():
        ours = model(torch.tensor([prompt]))[0, -1:].log_softmax(-1)
    torch.testing.assert_close(stranger.log_probabilities(prompt), ours, atol=1e-4, rtol=0)
    assert stranger.encode_prompt(PROMPTS[0]) == tokenizer.encode_prompt(PROMPTS[0])


def test_a_file_that_is_opened_and_dropped_at_once_does_not_block(tmp_path: Path) -> None:
    """Some of these processes waited forever while others had the core."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    code = f"""
import os
from pathlib import Path
from tiny_release import open_in_llama_cpp
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
for _ in range(3):
    open_in_llama_cpp(Path({str(tmp_path / "model.gguf")!r}), Path({str(checkpoint)!r}))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(tiny_release.__file__).parent)}
    crowd = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    try:
        assert [process.wait(timeout=60) for process in crowd] == [0, 0, 0]
    finally:
        for process in crowd:
            process.kill()
            process.wait()


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    stored["normalizer"] = {"type": "NFKC"}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"tokenizer\.json: expected no normalizer, or NFC.*got the normalizer NFKC"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", precision="f32")
    assert not list(tmp_path.glob("*.gguf*"))


def test_equal_models_are_equal_bytes(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    for name in "ab":
        write_gguf(checkpoint, tmp_path / name, precision="q8_0")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

"""How a model answers by default: its publisher's sampling stays with it, through import, saving and export."""

import json
from pathlib import Path

import foreign_models
import pytest
from gguf import GGUFReader
from tiny_release import PROMPTS, open_in_llama_cpp, tiny_checkpoint

from llm.errors import InputError
from llm.export.gguf import write_gguf
from llm.export.transformers_backend import TransformersBackend
from llm.inference.generate import generate
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
from llm.models.sampling_defaults import read_sampling
from llm.tokenizer.tokenizer import TextTokenizer

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def with_defaults(folder: Path, **fields: object) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def sampling_of(path: Path) -> dict[str, float]:
    fields = GGUFReader(path).fields
    return {name.removeprefix("general.sampling."): field.contents() for name, field in fields.items() if ".sampling." in name}


def test_sampling_stays_with_a_model_through_import_training_and_gguf(tmp_path: Path) -> None:
    source = with_defaults(foreign_models.FAMILIES["smollm"](tmp_path / "source"), **QWEN)
    import_checkpoint(inspect_checkpoint(source), tmp_path / "base")
    assert read_sampling(tmp_path / "base") == QWEN
    save_checkpoint(tmp_path / "tuned", load_checkpoint(tmp_path / "base"), tmp_path / "base")
    written = json.loads((tmp_path / "tuned" / "generation_config.json").read_text())
    assert written == written | QWEN | {"eos_token_id": TextTokenizer.load(tmp_path / "base").end}
    write_gguf(tmp_path / "tuned", tmp_path / "model.gguf", precision="f32")
    expected = {"temp": 0.7, "top_p": 0.8, "top_k": 20, "penalty_repeat": 1.05}
    assert sampling_of(tmp_path / "model.gguf") == pytest.approx(expected)


def test_a_model_that_is_trained_from_nothing_answers_greedily_everywhere(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    assert read_sampling(checkpoint) == {"do_sample": False}
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    assert sampling_of(tmp_path / "model.gguf") == {"temp": 0.0}


def test_answers_are_compared_greedily_whatever_the_defaults_are(tmp_path: Path) -> None:
    checkpoint = with_defaults(tiny_checkpoint(tmp_path / "model"), **QWEN | {"repetition_penalty": 9.0})
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    tokenizer = TextTokenizer.load(checkpoint)
    prompts = [tokenizer.encode_prompt(chat) for chat in PROMPTS]
    ours = generate(load_checkpoint(checkpoint), prompts, max_new_tokens=16, end=tokenizer.ends)
    assert any(len(set(answer)) < len(answer) for answer in ours)  # which the penalty would prevent
    stock = TransformersBackend(checkpoint, ends=tokenizer.ends, padding=tokenizer.padding)
    assert stock.answers(prompts, max_new_tokens=16) == ours
    assert open_in_llama_cpp(tmp_path / "model.gguf", checkpoint).answers(prompts, max_new_tokens=16) == ours


@pytest.mark.parametrize("value", ['"hot"', "-1", "true", "1e9"])
def test_a_default_that_is_no_number_in_range_is_refused_by_its_name(value: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": ' + value + "}")
    with pytest.raises(InputError, match=r"generation_config\.json: temperature: expected a number from 0 to 100, got"):
        read_sampling(tmp_path)

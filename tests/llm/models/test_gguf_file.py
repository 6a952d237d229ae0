"""GGUF files as checkpoints: weights, configuration and tokenizer come back from what was written, and from other files."""

import json
import shutil
from pathlib import Path
from typing import Any

import foreign_models
import pytest
import tokenizer_kinds
import torch
from gguf import GGUFReader, GGUFWriter
from hard_sentences import hard_sentences
from tiny_families import YARN, config_of, drawn
from tiny_release import PROMPTS, open_in_llama_cpp, tiny_checkpoint

from llm.errors import InputError
from llm.export import GgufPrecision
from llm.export.gguf import write_gguf
from llm.models import architectures
from llm.models.checkpoint import load_checkpoint, read_config, save_checkpoint, stored_dtype
from llm.models.gguf_file import unpack_gguf
from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
from llm.models.sampling_defaults import read_sampling
from llm.tokenizer.tokenizer import TextTokenizer


def imported(path: Path, target: Path) -> Path:
    """The checkpoint that a GGUF file becomes."""
    unpack_gguf(path, target / "unpacked")
    import_checkpoint(inspect_checkpoint(target / "unpacked"), target / "model")
    return target / "model"


@pytest.mark.parametrize("architecture", architectures())
def test_a_model_of_every_family_comes_back_from_its_file(architecture: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", architecture=architecture)
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    found = imported(tmp_path / "model.gguf", tmp_path / "again")
    ours, theirs = load_checkpoint(checkpoint).state_dict(), load_checkpoint(found).state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-6)  # 1 + w is rounded
    tokens = torch.tensor([TextTokenizer.load(checkpoint).encode_prompt(PROMPTS[0])])
    with torch.inference_mode():
        torch.testing.assert_close(load_checkpoint(found)(tokens), load_checkpoint(checkpoint)(tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["llama with yarn", "ministral3", "olmo3", "glm4", "gemma3_text"])
def test_the_options_and_the_scaling_of_a_family_come_back_from_its_file(case: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tied": False}  # the files of some have the head in any case
    if case in ("llama with yarn", "olmo3"):
        changes["rope_scaling"] = YARN | {"attention_factor": 1.3}
    config = config_of(case, **changes)
    vocabulary = tiny_checkpoint(tmp_path / "vocabulary")
    size = TextTokenizer.load(vocabulary).vocab_size
    save_checkpoint(tmp_path / "model", drawn(config, vocab_size=size), vocabulary)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", precision="f32")
    unpack_gguf(tmp_path / "model.gguf", tmp_path / "again")
    assert read_config(tmp_path / "again" / "config.json") == (config, size)


@pytest.mark.parametrize("family", foreign_models.FAMILIES)
def test_tokenizer_template_ends_and_scaling_come_back_from_the_file_alone(family: str, tmp_path: Path) -> None:
    import_checkpoint(inspect_checkpoint(foreign_models.FAMILIES[family](tmp_path / "source")), tmp_path / "model")
    original, config = TextTokenizer.load(tmp_path / "model"), read_config(tmp_path / "model" / "config.json")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", precision="bf16")
    if family == "llama-3":  # its scaling is that of another original context
        with pytest.raises(InputError, match=r"rope_freqs\.weight: expected the frequencies of Llama 3"):
            imported(tmp_path / "model.gguf", tmp_path / "again")
        return
    found = imported(tmp_path / "model.gguf", tmp_path / "again")
    tokenizer = TextTokenizer.load(found)
    assert read_config(found / "config.json") == config
    for text in hard_sentences(200):
        assert tokenizer.encode(text) == original.encode(text), text
    assert tokenizer.encode_prompt(PROMPTS[0]) == original.encode_prompt(PROMPTS[0])
    assert set(tokenizer.ends) == set(original.ends)
    assert (tokenizer.begin, tokenizer.padding) == (original.begin, original.padding)
    assert stored_dtype(found) == torch.bfloat16


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
def test_a_tokenizer_is_rebuilt_as_llama_cpp_runs_it(kind: str, tmp_path: Path) -> None:
    """So a second file gives the same tokens as the first in llama.cpp."""
    folder = tokenizer_kinds.save(tmp_path / "model", kind)
    sizes = {"hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "context": 2048, "intermediate_size": 8}
    family = architectures()["llama"]
    model = family.build(family.config(sizes), vocab_size=TextTokenizer.load(folder).vocab_size)
    save_checkpoint(folder, model, folder)
    write_gguf(folder, tmp_path / "first.gguf", precision="f32")
    again = imported(tmp_path / "first.gguf", tmp_path / "again")
    write_gguf(again, tmp_path / "second.gguf", precision="f32")
    first, second = open_in_llama_cpp(tmp_path / "first.gguf", folder), open_in_llama_cpp(tmp_path / "second.gguf", again)
    texts = hard_sentences(150, tokens=[*tokenizer_kinds.SPECIAL, *tokenizer_kinds.ADDED])
    assert [second.encode(text) for text in texts] == [first.encode(text) for text in texts]


@pytest.mark.parametrize(("precision", "dtype"), [("f16", torch.float16), ("q8_0", torch.float16), ("q4_0", torch.float16)])
def test_rounded_weights_are_those_that_llama_cpp_computes_with(
    precision: GgufPrecision, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    write_gguf(checkpoint, tmp_path / "model.gguf", precision=precision)
    found = imported(tmp_path / "model.gguf", tmp_path / "again")
    assert stored_dtype(found) == dtype
    model, tokenizer = load_checkpoint(found), TextTokenizer.load(found)
    stranger = open_in_llama_cpp(tmp_path / "model.gguf", found)
    for prompt in map(tokenizer.encode_prompt, PROMPTS):
        with torch.inference_mode():
            ours = model(torch.tensor([prompt]))[0, -1:].softmax(-1)
        # llama.cpp rounds activations to 8 bits too.
        assert (stranger.log_probabilities(prompt).exp() - ours).abs().sum() / 2 < 0.03


def test_the_tokenizer_beside_a_file_is_taken_if_it_has_its_tokens(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    write_gguf(checkpoint, tmp_path / "beside" / "model.gguf", precision="f32") if (
        tmp_path / "beside"
    ).mkdir() is None else None
    stored = json.loads((checkpoint / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "beside" / "tokenizer.json").write_text(json.dumps(stored))
    shutil.copyfile(checkpoint / "tokenizer_config.json", tmp_path / "beside" / "tokenizer_config.json")
    found = TextTokenizer.load(imported(tmp_path / "beside" / "model.gguf", tmp_path / "again"))
    assert found.encode("e\u0301") == found.encode("\u00e9")  # the normalizer is not in the file
    stored["model"]["vocab"]["another"] = len(stored["model"]["vocab"])
    (tmp_path / "beside" / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"tokenizer\.json beside it: expected the tokens of the file, got 'another'"):
        unpack_gguf(tmp_path / "beside" / "model.gguf", tmp_path / "third")


def test_sampling_defaults_come_back(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    path = checkpoint / "generation_config.json"
    wanted = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    path.write_text(json.dumps(json.loads(path.read_text()) | wanted))
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    assert read_sampling(imported(tmp_path / "model.gguf", tmp_path / "again")) == wanted


def rewritten(
    source: Path, target: Path, *, without: str = "", architecture: str | None = None, pre: str | None = None
) -> Path:
    """A file with one tensor fewer, or with another name of its architecture or pre-tokenizer."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, architecture or "llama")
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture")):
            continue
        value = pre if pre is not None and name == "tokenizer.ggml.pre" else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    source = tmp_path / "model.gguf"
    for changes, message in [
        ({"without": "blk.1.ffn_up.weight"}, r"a\.gguf: blk\.1\.ffn_up\.weight: expected a tensor of a llama, got none"),
        ({"architecture": "mamba"}, r"a\.gguf: general\.architecture: expected one of .*'llama'.*, got 'mamba'"),
        (
            {"pre": "viking"},
            r"a\.gguf: tokenizer\.ggml\.pre: expected one of .*, got 'viking': put the model's tokenizer\.json",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            unpack_gguf(rewritten(source, tmp_path / "a.gguf", **changes), tmp_path / "out")
    for content in (b"", b"GGUF", b"GGUF" + bytes(100), source.read_bytes()[:5000], b"not a model"):
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(InputError, match=r"broken\.gguf: expected a GGUF file, got one that cannot be read"):
            unpack_gguf(tmp_path / "broken.gguf", tmp_path / "out")

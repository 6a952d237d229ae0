"""Every family, with every option that llama.cpp knows, gives in llama.cpp the log-probabilities that it gives here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import CASES, CONTEXT, config_of, drawn
from tiny_release import PROMPTS, TEXTS, open_in_llama_cpp

from llm.errors import InputError
from llm.export.gguf import write_gguf
from llm.export.parity import TOLERANCE
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe

# What llama.cpp has not, by the option that is refused.
REFUSED = {
    "mistral with a window": "pattern",
    "qwen2 with windows": "pattern",
    "qwen3 with yarn and windows": "pattern",
    "qwen3 with biases": "attention_bias",
    "smollm3 with other layers": "pattern",
    "phi3 with a window": "pattern",
    "olmo3 with other layers": "pattern",
    "glm with larger heads": "head_size",
    "glm4 without biases": "attention_bias",
    "ministral3 with a window": "pattern",
    "gemma3_text with other layers": "pattern",
    "gemma2 without caps": "attention_softcap",
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    train_bpe(TEXTS * 2, 340, min_frequency=2, pre_tokenizer_name="smollm", allow_smaller=True).save(folder)
    return folder


def checkpoint_of(case: str, vocabulary: Path, folder: Path, **changes: Any) -> Path:
    size = TextTokenizer.load(vocabulary).vocab_size + 3  # unused rows of the embedding
    save_checkpoint(folder, drawn(config_of(case, **changes), vocab_size=size), vocabulary)
    return folder


def assert_equal_in_llama_cpp(checkpoint: Path, lengths: list[int], *, context: int | None = None) -> None:
    """The log-probabilities after prompts of these lengths."""
    file = checkpoint.parent / "model.gguf"
    write_gguf(checkpoint, file, precision="f32")
    model, tokenizer = load_checkpoint(checkpoint), TextTokenizer.load(checkpoint)
    stranger = open_in_llama_cpp(file, checkpoint, context=context)
    for length in lengths:
        prompt = (tokenizer.encode_prompt(PROMPTS[0]) * 9)[:length]
        with torch.inference_mode():
            ours = model(torch.tensor([prompt]))[0, -1:].log_softmax(-1)
        limit = TOLERANCE * max(1.0, float(ours.abs().max()))
        torch.testing.assert_close(stranger.log_probabilities(prompt), ours, atol=limit, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_llama_cpp_gives_the_log_probabilities_of_every_family(case: str, vocabulary: Path, tmp_path: Path) -> None:
    # Below windows and original contexts, and above; llama.cpp decides by the context it is given, not by the text, what is
    # long.
    lengths = [CONTEXT - 2] if "longrope" in case else [7, CONTEXT - 2]
    assert_equal_in_llama_cpp(checkpoint_of(case, vocabulary, tmp_path / "model"), lengths)


def test_texts_within_the_original_context_have_the_short_divisors_in_llama_cpp(vocabulary: Path, tmp_path: Path) -> None:
    scaling = CASES["phi3 with longrope"]["rope_scaling"] | {"original_context": 256}  # llama.cpp's least context
    checkpoint = checkpoint_of("phi3 with longrope", vocabulary, tmp_path / "model", rope_scaling=scaling, context=512)
    assert_equal_in_llama_cpp(checkpoint, [60], context=256)


@pytest.mark.parametrize("case", ["mistral with a window", "qwen2 with windows", "phi3 with a window"])
def test_a_window_that_hides_nothing_is_the_same_as_none_in_llama_cpp(case: str, vocabulary: Path, tmp_path: Path) -> None:
    options = CASES[case]["options"] | {"window": CONTEXT}
    assert_equal_in_llama_cpp(checkpoint_of(case, vocabulary, tmp_path / "model", options=options), [CONTEXT - 2])
    checkpoint = checkpoint_of(case, vocabulary, tmp_path / "less", options=options | {"window": CONTEXT - 1})
    with pytest.raises(InputError, match=r"pattern: expected .*at least the context, 64, is the same as none; here it is 63"):
        write_gguf(checkpoint, tmp_path / "less.gguf", precision="f32")


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_by_its_option(case: str, vocabulary: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(case, vocabulary, tmp_path / "model")
    with pytest.raises(InputError, match=rf"{REFUSED[case]}: expected .*, as llama\.cpp has it"):
        write_gguf(checkpoint, tmp_path / "model.gguf", precision="f32")
    assert not list(tmp_path.glob("*.gguf*"))

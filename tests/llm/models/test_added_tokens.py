"""New tokens of a model from elsewhere: their numbers, their rows, and what the tokenizer makes of text that has them."""

from pathlib import Path

import pytest
import torch
from foreign_models import FAMILIES, llama_2, llama_3
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm.errors import InputError
from llm.models.checkpoint import load_checkpoint, weight_files
from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer

WORDS = ["发烧和头痛", "blood through", "night:"]
BYTE_LEVEL = ["llama-3", "smollm"]
TEXT = "The heart pumps blood through it, and 发烧和头痛是 at night: no."


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_new_tokens_begin_as_the_mean_of_the_pieces_that_spelled_them(name: str, tmp_path: Path) -> None:
    source = FAMILIES[name](tmp_path / "source")
    candidate = inspect_checkpoint(source)
    pieces = [candidate.tokenizer.encode(word) for word in WORDS]
    facts = import_checkpoint(candidate, tmp_path / "made", add_tokens=WORDS)
    extended = TextTokenizer.load(tmp_path / "made")
    found = [extended.encode(word) for word in WORDS]
    assert [len(ids) for ids in found] == [1, 1, 1] and facts["added_tokens"] == 3
    assert [token for (token,) in found] == [candidate.tokenizer.vocab_size + number for number in range(3)]
    before = {key: tensor for path in weight_files(source) for key, tensor in load_file(path).items()}
    after = {key: tensor for path in weight_files(tmp_path / "made") for key, tensor in load_file(path).items()}
    for key, old in before.items():
        new = after[key]
        if key not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(new, old)
            continue
        assert len(new) == max(len(old), extended.vocab_size)  # padded rows are used first
        for (token,), ids in zip(found, pieces, strict=True):
            assert torch.equal(new[token], old[ids].float().mean(0).to(old.dtype))
        kept = [row for row in range(len(old)) if row not in {token for (token,) in found}]
        assert torch.equal(new[kept], old[kept])


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_stock_transformers_reads_the_new_tokens_and_computes_the_same(name: str, tmp_path: Path) -> None:
    import_checkpoint(inspect_checkpoint(FAMILIES[name](tmp_path / "source")), tmp_path / "made", add_tokens=WORDS)
    ours, stock = TextTokenizer.load(tmp_path / "made"), AutoTokenizer.from_pretrained(tmp_path / "made")
    ids = ours.encode(TEXT)
    assert stock(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert sum(token >= ours.vocab_size - 3 for token in ids) == 3
    assert ours.decode(ids) == TEXT
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)(torch.tensor([ids])).logits
        torch.testing.assert_close(load_checkpoint(tmp_path / "made")(torch.tensor([ids])), expected, atol=1e-4, rtol=1e-4)


def test_a_tokenizer_that_puts_spaces_behind_added_tokens_is_refused(tmp_path: Path) -> None:
    candidate = inspect_checkpoint(llama_2(tmp_path / "source"))
    with pytest.raises(InputError, match="one that puts a space there: 'ablood throughb' becomes 'ablood through b'"):
        import_checkpoint(candidate, tmp_path / "made", add_tokens=["blood through"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["heart", "a"], "'a', which is 1"),
        (["blood through", "blood through"], "'blood through' twice"),
        (["Fièvre"], "'Fièvre', which becomes"),  # its è is also how a byte is written
    ],
)
def test_words_that_cannot_become_tokens_are_named(words: list[str], told: str, tmp_path: Path) -> None:
    candidate = inspect_checkpoint(llama_3(tmp_path / "source"))
    with pytest.raises(InputError, match=told):
        import_checkpoint(candidate, tmp_path / "made", add_tokens=words)

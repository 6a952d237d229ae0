"""Tokens of llama.cpp against those of the tokenizer, for every kind of tokenizer and on 1,000 hard sentences.

The tokenizers of real models are compared in tests marked `long`, from the folders below STOCKPOT_REAL_TOKENIZERS, each with
the `tokenizer.json` and `tokenizer_config.json` of a repository, named qwen3, qwen2_5, llama3_2, deepseek_v3,
gemma3-tokenizer.
"""

import json
import os
import unicodedata
from pathlib import Path

import pytest
import tokenizer_kinds
import torch
from hard_sentences import hard_sentences
from tiny_release import PROMPTS, open_in_llama_cpp

from llm.errors import InputError
from llm.export.gguf import write_gguf
from llm.export.gguf_tokenizer import KnownTokens
from llm.models import architectures
from llm.models.checkpoint import save_checkpoint
from llm.tokenizer.llama_cpp import for_llama_cpp
from llm.tokenizer.pretokenizers import APPROXIMATIONS
from llm.tokenizer.tokenizer import TextTokenizer

REAL = ("qwen3", "qwen2_5", "llama3_2", "deepseek_v3", "gemma3-tokenizer", "smollm2")
RUNS = [sign * length for sign in ("\n", "\t") for length in range(2, 90)] + [f"a{' ' * length}b" for length in range(90)]


def smallest_model(folder: Path) -> Path:
    """A model of hidden size 8 around the tokenizer in `folder`."""
    sizes = {"hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "context": 2048, "intermediate_size": 8}
    kind = architectures()["llama"]
    torch.manual_seed(0)
    model = kind.build(kind.config(sizes), vocab_size=TextTokenizer.load(folder).vocab_size)
    save_checkpoint(folder, model, folder)
    return folder


def differing(folder: Path, texts: list[str]) -> list[str]:
    """The texts whose tokens in llama.cpp are others; each must be as it is known to give them."""
    write_gguf(folder, folder / "model.gguf", precision="f32")
    tokenizer, stranger = TextTokenizer.load(folder), open_in_llama_cpp(folder / "model.gguf", folder)
    known, found = KnownTokens(folder), list[str]()
    for text, ours in zip(texts, tokenizer.encode_batch(texts), strict=True):
        written = known.written(text)
        theirs = stranger.encode(written)
        if theirs != ours:
            assert theirs == known.encode(written), text
            found.append(text)
    for chat in PROMPTS if tokenizer.template is not None else ():
        assert stranger.encode_prompt(chat) == tokenizer.encode_prompt(chat)
    return found


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
def test_llama_cpp_gives_the_tokens_of_every_kind_of_tokenizer(kind: str, tmp_path: Path) -> None:
    """Where it does not, the texts are exactly those that are known: not in NFC, beginning with a space, cased or marked."""
    folder = smallest_model(tokenizer_kinds.save(tmp_path / "model", kind))
    found = for_llama_cpp(json.loads((folder / "tokenizer.json").read_text()))
    byte_level = tokenizer_kinds.BYTE_LEVEL.get(kind)
    assert (found.model, found.pre_tokenizer) == (("gpt2", byte_level[0]) if byte_level else ("llama", "default"))
    texts = hard_sentences(1000, tokens=[*tokenizer_kinds.SPECIAL, *tokenizer_kinds.ADDED])
    others = differing(folder, texts)
    if found.pre_tokenizer in APPROXIMATIONS:
        unmarked = [text for text in others if not any(unicodedata.category(sign)[0] == "M" for sign in text)]
        assert all(any(sign.isupper() and sign > "\x7f" for sign in text) for text in unmarked)
    elif kind in ("qwen2", "qwen3.5"):
        assert set(others) <= {text for text in texts if not unicodedata.is_normalized("NFC", text)}
    elif kind.startswith("metaspace"):
        assert all(
            text[0] in " ▁" or any(token + s in text for token in tokenizer_kinds.ADDED for s in " ▁") for text in others
        )
    elif kind == "mistral":  # the space that is written before a text is one piece before an added token
        assert all(text.startswith(tokenizer_kinds.ADDED) for text in others)
    else:
        assert others == []
    assert bool(others) == bool(found.differences)


@pytest.mark.long
@pytest.mark.skipif("STOCKPOT_REAL_TOKENIZERS" not in os.environ, reason="STOCKPOT_REAL_TOKENIZERS names no folder")
@pytest.mark.parametrize("name", REAL)
def test_llama_cpp_gives_the_tokens_of_real_tokenizers(name: str, tmp_path: Path) -> None:
    source = Path(os.environ["STOCKPOT_REAL_TOKENIZERS"], name)
    (tmp_path / "model").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((source / file).read_bytes())
    added = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    plain = [token["content"] for token in added if not token["special"]]
    texts = [*hard_sentences(1000, tokens=[added[0]["content"], *plain[:30]]), *RUNS]
    others = differing(smallest_model(tmp_path / "model"), texts)
    unlike = [text for text in others if unicodedata.is_normalized("NFC", text) and not any(token in text for token in plain)]
    assert unlike == [] or all("▁" in text for text in unlike)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, "expected no normalizer, or NFC, as llama.cpp has it, got the normalizer NFKC"),
        ({"normalizer": {"type": "Lowercase"}}, "got the normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"expected words in the byte alphabet \(ByteLevel\).*, got Whitespace"),
        ({"pre_tokenizer": None}, "got no pre-tokenizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "got a space before each text"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "expected byte pairs or pieces that are merged .*, got WordPiece"),
        ({"model": {"type": "Unigram", "vocab": []}}, "got Unigram"),
        ({"added_tokens": [{"content": "<m>", "special": True, "lstrip": True}]}, "'<m>', which takes the spaces before it"),
        (
            {"added_tokens": [{"content": t, "special": True, "rstrip": t == "<m>"} for t in ("<m>", "<n>")]},
            "'<m>', which takes the spaces after it",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused_with_the_reason(change: dict[str, object], message: str) -> None:
    stored = json.loads(tokenizer_kinds.byte_level("gpt-2").to_str())
    with pytest.raises(InputError, match=message):
        for_llama_cpp(stored | change)


def test_another_expression_is_refused_and_shown() -> None:
    stored = json.loads(tokenizer_kinds.byte_level("qwen2").to_str())
    stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\s+"
    with pytest.raises(InputError, match=r"expected one of its expressions that split words.*got '\\\\p\{L\}\+\|\\\\s\+'"):
        for_llama_cpp(stored)


def test_a_word_that_no_merges_make_is_refused_where_llama_cpp_merges_every_word() -> None:
    stored = json.loads(tokenizer_kinds.byte_level("qwen2").to_str())
    stored["model"]["ignore_merges"] = True
    assert for_llama_cpp(stored).pre_tokenizer == "qwen2"  # each token is what its merges make
    stored["model"]["vocab"]["Ġheartbeat"] = len(stored["model"]["vocab"])
    with pytest.raises(InputError, match=r"llama\.cpp merges every word under the name 'qwen2', got none for 'Ġheartbeat'"):
        for_llama_cpp(stored)


def test_pieces_whose_merges_are_not_those_of_their_scores_are_refused() -> None:
    stored = json.loads(tokenizer_kinds.pieces("llama-2").to_str())
    missing = {**stored, "model": {**stored["model"], "merges": [*stored["model"]["merges"]]}}
    several = [merge for merge in stored["model"]["merges"] if len("".join(merge)) > 2]
    twice = next(merge for merge in several if ["".join(other) for other in several].count("".join(merge)) > 1)
    missing["model"]["merges"].remove(twice)
    with pytest.raises(InputError, match="expected a merge of every pair that makes a piece"):
        for_llama_cpp(missing)
    apart = {
        **stored,
        "model": {**stored["model"], "merges": [merge for merge in stored["model"]["merges"] if merge != twice]},
    }
    apart["model"]["merges"] += [twice]
    with pytest.raises(InputError, match="expected all merges of a piece one after the other"):
        for_llama_cpp(apart)
    bytes_missing = {**stored, "model": {**stored["model"], "vocab": {**stored["model"]["vocab"]}}}
    del bytes_missing["model"]["vocab"]["<0x7F>"]
    with pytest.raises(InputError, match=r"expected a piece for every byte, as llama\.cpp has it, got none for <0x7F>"):
        for_llama_cpp(bytes_missing)


def test_a_tokenizer_whose_special_tokens_all_take_spaces_makes_a_model_of_the_name_that_does_so(tmp_path: Path) -> None:
    """As Phi-3's: only <unk>, <s> and <|endoftext|> keep the spaces after them."""
    folder = tokenizer_kinds.save(tmp_path / "model", "llama-2")
    stored = json.loads((folder / "tokenizer.json").read_text())
    for token in stored["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert differing(smallest_model(folder), hard_sentences(100)) == []

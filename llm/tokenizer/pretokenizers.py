"""How text is cut into words before byte pairs are merged: by name, as llama.cpp knows them.

llama.cpp holds a fixed list of these and reads only the name from a GGUF file, so a tokenizer must use one of its regular
expressions, with no normalizer before it, or exported models split words in another way than they were trained.
Source of the expressions: `llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

BYTES = 256  # tokens that every vocabulary holds, so that nothing is ever unknown

PreTokenizerName = Literal["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"]

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS_AND_LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"  # each alone

# Each expression cuts the pieces that the one before it left.
EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT_2,),
    "smollm": (_DIGIT, _GPT_2),
    "llama-bpe": (_CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}{1,3}",),  # numbers in threes
    "qwen2": (_CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}",),  # each digit alone
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Han, hiragana, katakana
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
# The same, as tokenizers from elsewhere write them.
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_ANY_CASE + "|" + _WORDS_AND_LINES % r"\p{N}{1,3}",),
    "qwen2": (_ANY_CASE + "|" + _WORDS_AND_LINES % r"\p{N}",),
}

# A word that is itself a token is that token, whatever its merges say: llama.cpp does so for this name alone.
WHOLE_WORDS_FIRST = frozenset({"llama-bpe"})


def pre_tokenizer(name: PreTokenizerName) -> "PreTokenizer":
    """The pre-tokenizer of that name, which gives words as bytes."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in EXPRESSIONS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def name_of(tokenizer: Mapping[str, Any]) -> PreTokenizerName | None:
    """The name of the pre-tokenizer in a `tokenizer.json`; None where it is none of these, or not all that cuts the text.

    Whether whole words come first is not compared: it matters only to words that no merges lead to.
    """
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or tokenizer.get("normalizer"):
        return None
    found = _cuts(tokenizer.get("pre_tokenizer") or {})
    names: tuple[PreTokenizerName, ...] = get_args(PreTokenizerName)
    for name in names:
        if found in (EXPRESSIONS[name], ELSEWHERE.get(name)):
            return name
    return None


def _cuts(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The expressions that a pre-tokenizer cuts by, one after the other, if it then gives words as bytes."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    cuts: list[str] = []
    for part in parts[:-1]:
        match part:
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
                cuts.append(expression)
            case {"type": "Digits", "individual_digits": True}:
                cuts.append(_DIGIT)
            case _:
                return None
    return (*cuts, _GPT_2) if last.get("use_regex", True) else tuple(cuts)

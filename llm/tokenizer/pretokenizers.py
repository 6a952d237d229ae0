"""Pre-tokenizers, which split text into words before byte pairs are merged, by their names in llama.cpp.

llama.cpp has a fixed list of them and reads only the name from a GGUF file. So a tokenizer must use one of its regular
expressions and no normalizer, or an exported model splits words differently than in training.
Source of the expressions: `llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

BYTES = 256  # tokens that every vocabulary has, so that no text is unknown

PreTokenizerName = Literal["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"]

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS_AND_LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"  # one digit a piece

# Each expression splits the pieces of the one before it.
EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT_2,),
    "smollm": (_DIGIT, _GPT_2),
    "llama-bpe": (_CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}{1,3}",),  # numbers in threes
    "qwen2": (_CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}",),  # one digit a piece
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Han, hiragana, katakana
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
# The same, as tokenizers of other models write them.
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
OTHER_SPELLINGS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_ANY_CASE + "|" + _WORDS_AND_LINES % r"\p{N}{1,3}",),
    "qwen2": (_ANY_CASE + "|" + _WORDS_AND_LINES % r"\p{N}",),
}

# A word that is a token is encoded as it without any merges: llama.cpp does so only for this name.
WHOLE_WORDS_FIRST = frozenset({"llama-bpe"})


def pre_tokenizer(name: PreTokenizerName) -> "PreTokenizer":
    """The pre-tokenizer of that name, which gives words in the byte alphabet."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in EXPRESSIONS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer_name_of(tokenizer: Mapping[str, Any]) -> PreTokenizerName | None:
    """The name of the pre-tokenizer in a `tokenizer.json`; None if it is none of these, or if something else splits text too.

    WHOLE_WORDS_FIRST is not compared: it matters only to words that no merges produce.
    """
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or tokenizer.get("normalizer"):
        return None
    found = _expressions(tokenizer.get("pre_tokenizer") or {})
    names: tuple[PreTokenizerName, ...] = get_args(PreTokenizerName)
    for name in names:
        if found in (EXPRESSIONS[name], OTHER_SPELLINGS.get(name)):
            return name
    return None


def _expressions(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The expressions that a pre-tokenizer splits by, in order; None if it does not give words in the byte alphabet."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    found: list[str] = []
    for part in parts[:-1]:
        match part:
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
                found.append(expression)
            case {"type": "Digits", "individual_digits": True}:
                found.append(_DIGIT)
            case _:
                return None
    return (*found, _GPT_2) if last.get("use_regex", True) else tuple(found)

"""How text is cut into words before byte pairs are merged: by name, as llama.cpp knows them.

llama.cpp holds a fixed list of these and reads only the name from a GGUF file, so a tokenizer must use one of its regular
expressions, with no normalizer before it, or exported models split words in another way than they were trained.
Source of the expressions: `llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

BYTES = 256  # tokens that every vocabulary holds, so that nothing is ever unknown

PreTokenizerName = Literal["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"]

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS_AND_LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Each expression cuts the pieces that the one before it left.
EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT_2,),
    "smollm": (r"\p{N}", _GPT_2),  # each digit alone
    "llama-bpe": (_CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}{1,3}",),  # numbers in threes
    "qwen2": (_CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}",),  # each digit alone
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Han, hiragana, katakana
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}

# A word that is itself a token is that token, whatever its merges say: llama.cpp does so for this name alone.
WHOLE_WORDS_FIRST = frozenset({"llama-bpe"})


def pre_tokenizer(name: PreTokenizerName) -> "PreTokenizer":
    """The pre-tokenizer of that name, which gives words as bytes."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in EXPRESSIONS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

"""Pre-tokenizers, which split text into words before byte pairs are merged, by their names in llama.cpp.

llama.cpp has a fixed list of them and reads only the name from a GGUF file. So a tokenizer must use one of its regular
expressions and no normalizer, or an exported model splits words differently than in training. `llm.tokenizer.llama_cpp` says
what llama.cpp makes of the tokenizers of others.
Source of the expressions: `llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

BYTES = 256  # tokens that every vocabulary has, so that no text is unknown

PreTokenizerName = Literal["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"]  # those that recipes train with

CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS_AND_LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The ends of GPT-4o's and Tekken's expressions, after their words.
_AND_PATHS = r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# A word of theirs begins a new one at an upper-case letter that follows a lower-case one.
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
# What llama.cpp computes instead: case for ASCII alone, and no combining mark in a word.
_CASED_IN_ASCII = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+%s"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*%s"
)
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"  # one digit a piece
_OPTIONAL = CONTRACTIONS + "?"

# Each expression splits the pieces of the one before it.
EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT_2,),
    "smollm": (DIGIT, GPT_2),  # also of StarCoder, Refact and Granite
    "llama-bpe": (CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}{1,3}",),  # numbers in threes
    "qwen2": (CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}",),  # one digit a piece
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Han, hiragana, katakana
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "dbrx": (CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}{1,3}",),  # cl100k; unlike "llama-bpe" it merges every word
    "qwen35": (  # combining marks are part of a word
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "seed-coder": (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",),
    "minicpm5": (r"\p{N}{1,3}", CONTRACTIONS + "|" + _WORDS_AND_LINES % r"\p{N}+"),
    "tekken": (_CASED % ("", "") + _AND_PATHS % r"\p{N}",),
    "gpt-4o": (_CASED % (_OPTIONAL, _OPTIONAL) + _AND_PATHS % r"\p{N}{1,3}",),  # o200k
}
# The expressions that llama.cpp runs under a name where they are not those of the tokenizers that have the name.
APPROXIMATIONS: dict[str, tuple[str, ...]] = {
    "tekken": (_CASED_IN_ASCII % ("", "") + _AND_PATHS % r"\p{N}",),
    "gpt-4o": (_CASED_IN_ASCII % (_OPTIONAL, _OPTIONAL) + _AND_PATHS % r"\p{N}{1,3}",),
}

# A word that is a token is encoded as it without any merges: llama.cpp does so only for these names.
WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "tekken", "minicpm5"})


def pre_tokenizer(name: PreTokenizerName) -> "PreTokenizer":
    """The pre-tokenizer of that name, which gives words in the byte alphabet."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in EXPRESSIONS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

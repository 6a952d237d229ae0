"""What llama.cpp makes of a tokenizer: the name under which it computes the same, or the reason why it cannot.

llama.cpp reads no `tokenizer.json`. A GGUF file holds tokens, merges or scores, and a name, and llama.cpp does what it knows
under that name. So a tokenizer is recognised here by what it computes, its normalizer, expressions and merges, never by the
name of its model, and one that llama.cpp has no name for is refused. Where llama.cpp leaves something out (it never
normalizes, and it approximates two expressions), `LlamaCppTokenizer.as_run` is the tokenizer that it runs instead, so that a
comparison can tell these texts from faults. Source: src/llama-vocab.cpp and src/unicode.cpp of llama.cpp.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm.errors import InputError
from llm.tokenizer.pretokenizers import APPROXIMATIONS, CONTRACTIONS, DIGIT, EXPRESSIONS, GPT_2, WHOLE_WORDS_FIRST

SPACE = "\u2581"  # what stands for a space in the pieces of sentencepiece
BYTE = re.compile("<0x[0-9A-F]{2}>")  # the piece of a single byte
# llama.cpp knows a token that takes the spaces after it only in models whose name has this, and then all but these do.
# (llama-vocab.cpp, "set attributes by model/tokenizer/architecture name")
PHI_3, _KEEP_SPACES = "phi-3", frozenset({"<unk>", "<s>", "<|endoftext|>"})
# Added tokens that it takes for special ones by their text, whatever their type, and those that it takes for plain ones.
_BY_TEXT = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[
<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> <|fim_suffix|>
<fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> <|fim_middle|> <fim-middle>
<fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|> <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]
<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
"""
_SPECIAL_BY_TEXT = frozenset(_BY_TEXT.split())
_PLAIN_BY_TEXT = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})

# Other spellings of the same expressions, as replacements. A possessive quantifier in front of what its class excludes, and a
# line break that a greedy run of spaces has left, match what the plain ones match. `(?i:'s)` also matches U+017F after an
# apostrophe, which no text has.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"\"", '"'),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", CONTRACTIONS),
    (r"'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS),
    ("]?+", "]?"),
    ("]++", "]+"),
    (r"\s*[\r\n]|", r"\s*[\r\n]+|"),
)


@dataclass(frozen=True)
class LlamaCppTokenizer:
    """A tokenizer as llama.cpp has it."""

    model: Literal["gpt2", "llama"]  # words of bytes with merges, or the pieces of sentencepiece with scores
    pre_tokenizer: str
    as_run: Mapping[str, Any]  # the `tokenizer.json` of what llama.cpp computes
    differences: tuple[str, ...] = ()  # what it computes otherwise, in words
    space_prefix: bool = False  # whether a text begins as after a space
    text_prefix: str = ""  # what a caller has to write before a text, since llama.cpp would write it into chats too
    model_name: str | None = None  # a name that the model must have


def for_llama_cpp(tokenizer: Mapping[str, Any], *, thorough: bool = True) -> LlamaCppTokenizer:
    """What llama.cpp makes of a `tokenizer.json`; InputError with the reason if it would give other tokens.

    Without `thorough`, merges are not looked at: that takes seconds for a vocabulary of 262,144 tokens.
    """
    model = tokenizer["model"]
    if (kind := model.get("type", "BPE")) != "BPE":
        raise _refused("byte pairs or pieces that are merged (BPE)", kind)
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise _refused(f"no {field}", repr(model[field]))
    model_name = _stripping(tokenizer.get("added_tokens", ()))
    found = _pieces(tokenizer, thorough) if model.get("byte_fallback") else _words(tokenizer, thorough)
    by_text = [token["content"] for token in tokenizer.get("added_tokens", ()) if not token["special"]]
    by_text = [token for token in by_text if token in _SPECIAL_BY_TEXT]
    special = (f"in a text, {', '.join(by_text[:3])} and such are characters, not tokens",) if by_text else ()
    return replace(found, differences=(*found.differences, *special), model_name=model_name)


def _refused(expected: str, got: str) -> InputError:
    return InputError(f"expected {expected}, as llama.cpp has it, got {got}: a GGUF file would give other tokens")


def _words(tokenizer: Mapping[str, Any], thorough: bool) -> LlamaCppTokenizer:
    """Words in the byte alphabet, as GPT-2 has them."""
    names = [normalizer["type"] for normalizer in _flat(tokenizer.get("normalizer"), "normalizers")]
    if names not in ([], ["NFC"]):
        raise _refused("no normalizer, or NFC", f"the normalizer {' and '.join(names)}")
    found = _expressions(tokenizer)
    whole = bool(tokenizer["model"].get("ignore_merges"))
    fitting = [name for name, expressions in EXPRESSIONS.items() if _spelled(expressions) == _spelled(found)]
    if not fitting:
        raise _refused("one of its expressions that split words", f"{_shown(found)}")
    name = next((name for name in fitting if (name in WHOLE_WORDS_FIRST) == whole), fitting[0])
    whole_there = name in WHOLE_WORDS_FIRST
    if thorough and whole != whole_there and (word := _unmerged_word(tokenizer)):
        does = "takes a word that is a token as a whole" if whole_there else "merges every word"
        raise InputError(
            f"expected merges that produce every token, since llama.cpp {does} under the name {name!r}, got none for {word!r}"
        )
    differences = []
    if names:
        differences.append("it does not bring text into Unicode's NFC")
    if name in APPROXIMATIONS:
        differences.append("it sees case in ASCII alone, and splits words at combining marks")
    as_run = _plainly_added(tokenizer) | {
        "normalizer": None,
        "pre_tokenizer": byte_level(APPROXIMATIONS.get(name, EXPRESSIONS[name])),
        "model": {**tokenizer["model"], "ignore_merges": whole_there},
    }
    return LlamaCppTokenizer("gpt2", name, as_run, tuple(differences))


def _pieces(tokenizer: Mapping[str, Any], thorough: bool) -> LlamaCppTokenizer:
    """Pieces of characters that fall back to bytes, as sentencepiece has them."""
    vocabulary: Mapping[str, int] = tokenizer["model"]["vocab"]
    if missing := [byte for byte in (f"<0x{number:02X}>" for number in range(256)) if byte not in vocabulary]:
        raise _refused("a piece for every byte", f"none for {missing[0]}")
    prefix, differences, text_prefix = _prefix(tokenizer)
    if thorough:
        _check_merges(tokenizer)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), replaced]
    as_run = _plainly_added(tokenizer) | {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "model": {**tokenizer["model"], "ignore_merges": False},
    }
    as_run["added_tokens"] = [token for token in as_run["added_tokens"] if not is_merged(token, vocabulary)]
    return LlamaCppTokenizer("llama", "default", as_run, differences, prefix, text_prefix)


def is_merged(added: Mapping[str, Any], vocabulary: Mapping[str, int]) -> bool:
    """Whether an added token is a run of spaces that merges produce too. It is written as an ordinary piece, since llama.cpp
    prints the signs of an added one as they are.
    """
    return SPACE in added["content"] and not added["special"] and added["content"] in vocabulary


def _prefix(tokenizer: Mapping[str, Any]) -> tuple[bool, tuple[str, ...], str]:
    """How spaces become pieces: whether each text begins as after one, what differs, and what a caller writes before a
    text."""
    before = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    steps = [*_flat(before[0], "normalizers"), *_flat(before[1], "pretokenizers")]
    match steps:
        case [{"type": "Metaspace", "replacement": "\u2581"} as metaspace]:
            if metaspace.get("split", True) and (piece := _with_inner_space(tokenizer)):
                raise _refused("pieces without spaces inside, where words are split at spaces", repr(piece))
            match metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never"):
                case "always":
                    return True, ("a text that begins with a space gets another one",), ""
                case "first":
                    return False, ("a text, not a chat, begins as after a space only if a space is written before it",), " "
            return False, (), ""
        case [{"type": "Prepend", "prepend": "\u2581"}, step, *rest] if _replaces_spaces(step) and _splits_nothing(rest):
            return True, (), ""
        case [step, *rest] if _replaces_spaces(step) and _splits_nothing(rest):
            return False, (), ""
    names = " and ".join(str(step.get("type")) for step in steps) or "nothing"
    raise _refused(f"spaces that become {SPACE}, by Metaspace or by Prepend and Replace alone", names)


def _replaces_spaces(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE


def _splits_nothing(steps: list[Mapping[str, Any]]) -> bool:
    """Whether a pre-tokenizer is none, or one at spaces, of which there are none any more."""
    return not steps or [(step.get("type"), step.get("pattern")) for step in steps] == [("Split", {"String": " "})]


def _with_inner_space(tokenizer: Mapping[str, Any]) -> str | None:
    added = {token["content"] for token in tokenizer.get("added_tokens", ())}
    return next((piece for piece in tokenizer["model"]["vocab"] if SPACE in piece[1:] and piece not in added), None)


def _check_merges(tokenizer: Mapping[str, Any]) -> None:
    """InputError unless merging the pair whose piece has the best score, as llama.cpp does, is merging by these merges."""
    merges = list(merges_of(tokenizer))
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first = ranks.setdefault(left + right, rank)
        # Merges of other pieces in between do not matter if the pieces have no characters in common, or are runs of one, as
        # in Gemma, whose runs of line breaks, spaces and tabs are compared in llama.cpp by a test.
        for other in {"".join(merge) for merge in merges[first + 1 : rank]} - {left + right} if rank - first > 1 else ():
            if set(other) & set(left + right) and len(set(other) | set(left + right)) > 1:
                raise _refused(
                    "all merges of a piece one after the other", f"that of {other!r} between those of {left + right!r}"
                )
    pairs = set(merges)
    vocabulary = tokenizer["model"]["vocab"]
    for piece in ranks:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary and (left, right) not in pairs and _is_made(left, right, ranks):
                raise _refused(f"a merge of every pair that makes a piece, as of {left!r} and {right!r}", "none for it")


def _is_made(left: str, right: str, ranks: Mapping[str, int]) -> bool:
    """Whether both parts can be made of characters: a merge of others never happens."""
    return all(len(part) == 1 or part in ranks for part in (left, right))


def merges_of(tokenizer: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The merges of a `tokenizer.json`, whose older form writes each as one text."""
    for merge in tokenizer["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _unmerged_word(tokenizer: Mapping[str, Any]) -> str | None:
    """A word that is a token, but not the one that merges make of it."""
    from tokenizers.models import BPE

    vocabulary: Mapping[str, int] = tokenizer["model"]["vocab"]
    added = {token["content"] for token in tokenizer.get("added_tokens", ())}
    model = BPE(dict(vocabulary), list(merges_of(tokenizer)), ignore_merges=False)
    return next((word for word in vocabulary if word not in added and len(model.tokenize(word)) != 1), None)


def _expressions(tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """The expressions that split text, in order."""
    parts = _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    last = parts[-1] if parts else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        got = (
            "a space before each text"
            if last.get("add_prefix_space")
            else " and ".join(str(part.get("type")) for part in parts)
        )
        raise _refused("words in the byte alphabet (ByteLevel)", got or "no pre-tokenizer")
    found: list[str] = []
    for part in parts[:-1]:
        match part:
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
                found.append(expression)
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Removed", "invert": True} if (
                r"|\s+" in expression
            ):
                found.append(expression)  # keeps what matches, and it matches everything
            case {"type": "Digits", "individual_digits": True}:
                found.append(DIGIT)
            case _:
                raise _refused("a pre-tokenizer that splits by expressions", str(part.get("type")))
    return (*found, GPT_2) if last.get("use_regex", True) else tuple(found)


def _spelled(expressions: Iterable[str]) -> tuple[str, ...]:
    """The expressions in one spelling."""
    spelled = []
    for expression in expressions:
        for other, ours in _SPELLINGS:
            expression = expression.replace(other, ours)
        spelled.append(expression)
    return tuple(spelled)


def _shown(expressions: tuple[str, ...]) -> str:
    text = " then ".join(expressions)
    return repr(text if len(text) <= 200 else text[:197] + "...")


def byte_level(expressions: Iterable[str]) -> dict[str, Any]:
    """A pre-tokenizer of a `tokenizer.json` that splits by `expressions`, into words in the byte alphabet."""
    splits = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in expressions
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, level]}


def _flat(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if step is None:
        return []
    return [inner for part in step[parts] for inner in _flat(part, parts)] if step.get("type") == "Sequence" else [step]


def _stripping(added: Iterable[Mapping[str, Any]]) -> str | None:
    """The name that the model needs so that llama.cpp strips the spaces after its added tokens; None if none are stripped."""
    tokens = list(added)
    for token in tokens:
        if token.get("lstrip") or token.get("single_word"):
            what = "takes the spaces before it" if token.get("lstrip") else "is none inside a word"
            raise _refused("added tokens that stand for themselves", f"{token['content']!r}, which {what}")
    stripping = {token["content"] for token in tokens if token.get("rstrip")}
    if not stripping:
        return None
    if stripping | _KEEP_SPACES != {token["content"] for token in tokens} | _KEEP_SPACES or stripping & _KEEP_SPACES:
        raise _refused("added tokens that stand for themselves", f"{min(stripping)!r}, which takes the spaces after it")
    return PHI_3


def _plainly_added(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer with its added tokens as llama.cpp finds them: in a text as it is, and some special only by their text."""
    added = [
        {
            **token,
            "normalized": False,
            "special": (token["special"] or token["content"] in _SPECIAL_BY_TEXT) and token["content"] not in _PLAIN_BY_TEXT,
        }
        for token in tokenizer.get("added_tokens", ())
    ]
    return {**tokenizer, "added_tokens": added, "post_processor": None}

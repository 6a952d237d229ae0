"""Parity checks: whether other systems compute the same as the model that was trained.

The systems are Transformers (`llm.export.transformers_backend`) and llama.cpp (`llm.export.llama_cpp_backend`). The checks
compare the tokens of sentences, the tokens of chats, log-probabilities, and greedy answers. Systems round differently, so
greedy answers may diverge where two tokens are almost equally likely: such a near tie is reported, and passes.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from llm.inference.generate import generate
from llm.models.interface import LanguageModel
from llm.text.documents import language_by_script
from llm.text.selection import evenly_spaced
from llm.tokenizer.tokenizer import ChatMessage, TextTokenizer

NEAR_TIE = 1e-4  # logits closer than this are a near tie
TOLERANCE = 1e-4  # largest difference of log-probabilities in fp32, relative to the largest of them (at least 1)
# The largest mean share of probability that moves to other tokens if weights are stored in fewer bits. Measured in the order
# f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 on the model of the recipe quickstart: 0.05%, 0.4%, 1%, 4%, 5%, 9% and 11%; on
# SmolLM2-135M-Instruct, whose weights had been rounded to q4_1 before: 0.06%, 0.5%, 3%, 30%, 11%, 2% and 36%, and of
# K-quants q6_k 4%, q5_k_m 14%, q5_k_s 16%, q4_k_s 8%, q3_k_m 12%, q2_k 29%. With rotary
# channels in the wrong order 15% moved on the former.
MAX_MOVED = {"f16": 0.01, "bf16": 0.05, "q8_0": 0.05, "q5_1": 0.4, "q5_0": 0.4, "q4_1": 0.5, "q4_0": 0.5}
MAX_MOVED |= {"q6_k": 0.2, "q5_k_m": 0.4, "q5_k_s": 0.4, "q4_k_m": 0.5, "q4_k_s": 0.5, "q3_k_m": 0.8, "q2_k": 0.95}
# The largest difference of a weight from its rounded one, as a share of its size. Measured on the model of the recipe
# quickstart: q8_0 0.5%, q5_1 and q5_0 4%, q4_1 8%, q4_0 9%; those of K-quants follow their bits, since llama.cpp keeps its
# rows of 128 in other blocks. Rows in another order differ by about 140%: two weights that have nothing in common.
MAX_ROUNDED = {
    **{"q8_0": 0.02, "q6_k": 0.05, "q5_1": 0.1, "q5_0": 0.1, "q5_k_m": 0.1, "q5_k_s": 0.1},
    **{"q4_1": 0.2, "q4_0": 0.2, "q4_k_m": 0.2, "q4_k_s": 0.2, "q3_k_m": 0.35, "q2_k": 0.6},
}
# The same against the model with the weights as the file has them: what is left is that llama.cpp rounds activations to 8
# bits. Measured: 0.5% to 0.8% on the model of quickstart, 2% to 4% on SmolLM2-135M-Instruct, and 5% of q5_k_m.
MAX_MOVED_OF_FILE = 0.08

# The largest share of texts whose tokens in llama.cpp differ as is known (`llm.tokenizer.llama_cpp`). Of 396,000
# sentences of the shipped data none is not in NFC; of a language that llama.cpp splits otherwise, most sentences differ.
MAX_KNOWN = 0.01

# Always compared: texts on which similar tokenizers differ.
PROBES = (
    "It's 12:05; we'LL pay $1,234.50 for 3.5 kg, won't we?",
    "  two  spaces,\ttabs\t\tand\n\n\nlines \n end  ",
    'Don\'t shout: "WHY?!" he asked... (twice) — naïve café, Ångström, Straße.',
    "发烧38.5度，头痛、咳嗽三天。应该怎么办？",
    "医生说：“多喝水，少吃油腻。”然后开了2种药（各7天）。",
    "２０２４年１月１日，ＡＢＣ ＆ 全角！",
    "中文English混排 with 数字123和標點。",
    "def f(x):\n    return x ** 2  # comment\n",
    "https://example.org/a_b?c=d&e=%20f",
    "ひらがなとカタカナ 한국어 русский العربية हिन्दी",
    "emoji 👩‍⚕️ 💊 and e\u0301 combining",
    "00000 1000000 3.14159265358979 ¼ ½ ²",
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


class Backend(Protocol):
    """The model in another system."""

    name: str

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special tokens."""

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The tokens of a chat up to where the assistant answers."""

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int] | None:
        """The tokens of a whole chat; None if the system cannot encode it."""

    def log_probabilities(self, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token after the last P of `tokens`, (P, V); NaN for those it does not report."""

    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens after each prompt."""


class Known(Protocol):
    """What is known of the tokens of another system: `llm.export.gguf_tokenizer.KnownTokens`."""

    differences: Sequence[str]  # in words

    def written(self, text: str) -> str:
        """A text as it is given to the other system."""

    def encode(self, text: str) -> list[int]:
        """The tokens that the other system is known to give for a text."""

    def encode_rendered(self, text: str) -> list[int]:
        """The tokens that it is known to give for a rendered chat."""


@dataclass(frozen=True)
class Check:
    """The result of one comparison; `passed` is None if it could not be made."""

    name: str  # "llama.cpp f32: answers"
    passed: bool | None
    told: str  # the result in words, with the first difference
    compared: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)  # depends on the machine


@dataclass(frozen=True)
class Reference:
    """The model as trained, and its greedy answers to the prompts, with which every system is compared."""

    model: LanguageModel
    tokenizer: TextTokenizer
    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    max_new_tokens: int

    @classmethod
    def of(
        cls, model: LanguageModel, tokenizer: TextTokenizer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
    ) -> "Reference":
        """The reference that answers the prompts with `model`."""
        answers = generate(model, prompts, max_new_tokens=max_new_tokens, end=tokenizer.ends)
        return cls(model, tokenizer, prompts, answers, max_new_tokens)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], *, last: int) -> Tensor:
        """Logits (P, V) after the `last` P tokens; those of the others are never computed."""
        hidden = self.model.hidden(torch.tensor([list(tokens)], device=self.model.device))[0, -last:]
        logits: Tensor = self.model.lm_head(hidden)
        return logits.cpu()


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """The sentences of English or Chinese texts."""
    for text in texts:
        for sentence in _SENTENCE_END.split(text):
            if sentence.strip():
                yield sentence


def balanced_by_language(texts: Iterable[str], count: int) -> dict[str, list[str]]:
    """At most `count` distinct texts, by language, in equal numbers as far as the languages have enough."""
    languages: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        languages.setdefault(language_by_script(text), []).append(text)
    chosen: dict[str, list[str]] = {}
    left = count
    for place, (language, those) in enumerate(sorted(languages.items(), key=lambda item: (len(item[1]), item[0]))):
        chosen[language] = evenly_spaced(those, left // (len(languages) - place))
        left -= len(chosen[language])
    return {language: those for language, those in chosen.items() if those}


def check_tokens(tokenizer: TextTokenizer, other: Backend, texts: Sequence[str], *, known: Known | None = None) -> Check:
    """Whether the other system splits every text into the same tokens, apart from what is `known` of it."""
    written = texts if known is None else [known.written(text) for text in texts]
    compared = zip(texts, tokenizer.encode_batch(texts), map(other.encode, written), written, strict=True)
    return _equal(
        f"{other.name}: tokens",
        "texts",
        ((text, ours, theirs, known is not None and known.encode(given) == theirs) for text, ours, theirs, given in compared),
        known,
    )


def check_chats(
    tokenizer: TextTokenizer, other: Backend, chats: Sequence[Sequence[ChatMessage]], *, known: Known | None = None
) -> Check:
    """Whether the other system renders chats, which end with an answer, to the tokens of training."""

    def compared() -> Iterator[tuple[str, list[int], list[int], bool]]:
        for chat in chats:
            ours, _ = tokenizer.encode_chat(chat)
            prompt = other.encode_prompt(chat[:-1])
            rendered = "" if known is None else tokenizer.render(chat[:-1], add_generation_prompt=True)
            expected = known is not None and known.encode_rendered(rendered) == prompt
            yield chat[-2]["content"] if len(chat) > 1 else "", ours[: len(prompt)], prompt, expected
            if (whole := other.encode_chat(chat)) is not None:
                yield chat[-1]["content"], ours, whole[: len(ours)], False

    return _equal(f"{other.name}: chats", "renderings", compared(), known)


def _equal(name: str, what: str, compared: Iterable[tuple[str, list[int], list[int], bool]], known: Known | None) -> Check:
    """The check of texts with their tokens here and there, and whether those there are what is known of the other system.

    A text of the data that differs as is known passes, and is told, as long as there are few.
    """
    count, different, first = 0, 0, ""
    expected: list[str] = []
    for text, ours, theirs, is_known in compared:
        count += 1
        if ours != theirs and is_known:
            expected.append(text)
        elif ours != theirs:
            different += 1
            first = first or f"; the first: {text[:60]!r} is {_part(ours, theirs)} here, {_part(theirs, ours)} there"
    told = f"{count - different - len(expected):,} of {count:,} {what}{first}"
    if expected and known is not None:
        shown = ", ".join(repr(text[:40]) for text in expected[:3])
        told += f"; {len(expected):,} others as it is known to give them ({'; '.join(known.differences)}), such as {shown}"
    of_data = sum(text not in PROBES for text in expected)
    passed = not different and of_data <= MAX_KNOWN * count
    return Check(name, passed, told, count, {"known_differences": len(expected)} if known is not None else {})


def _part(tokens: Sequence[int], other: Sequence[int]) -> str:
    """A few tokens from the first difference."""
    start = next((place for place, pair in enumerate(zip(tokens, other, strict=False)) if pair[0] != pair[1]), len(other))
    return f"{list(tokens[start : start + 4])} at {start}"


def check_likelihoods(
    reference: Reference,
    other: Backend,
    texts: Sequence[Sequence[int]],
    *,
    precision: str = "f32",
    of_file: LanguageModel | None = None,
) -> Check:
    """Whether log-probabilities after `texts` are equal up to rounding, or close if weights are stored in fewer bits.

    `of_file` is the model with the weights of the file, which is then compared instead.
    """
    if of_file is not None:
        reference = replace(reference, model=of_file)
    worst, largest, moved = 0.0, 1.0, 0.0
    for tokens in texts:
        theirs = other.log_probabilities(tokens)
        ours = reference.logits(tokens, last=len(theirs)).log_softmax(-1)
        reported = ~theirs.isnan()
        difference = (ours - theirs)[reported].abs()
        if not reported.any(-1).all() or not torch.isfinite(difference).all():
            worst = moved = math.inf
            break
        worst = max(worst, float(difference.max()))
        largest = max(largest, float(ours[reported].abs().max()))
        moved += float((ours.exp() - theirs.exp())[reported].abs().sum() / 2 / len(theirs))
    moved /= max(1, len(texts))
    name = f"{other.name}: likelihoods"
    if precision == "f32":
        limit = TOLERANCE * largest
        told = f"log-probabilities after {len(texts):,} texts differ by at most {worst:.1e}, expected at most {limit:.1e}"
        return Check(name, worst <= limit, told, len(texts), {"largest_difference": worst})
    most, weights = (MAX_MOVED[precision], "") if of_file is None else (MAX_MOVED_OF_FILE, " from that of its own weights")
    told = f"after {len(texts):,} texts {moved:.2%} of the probability moves{weights}, expected at most {most:.0%}"
    return Check(
        name if of_file is None else f"{other.name}: computation",
        moved <= most,
        told,
        len(texts),
        {"probability_moved": moved},
    )


@torch.inference_mode()
def check_weights(reference: Reference, of_file: LanguageModel, *, name: str, precision: str) -> Check:
    """Whether the weights of a file, in `of_file`, are those of the model but for their rounding."""
    worst, where = 0.0, "none"
    stored = dict(of_file.named_parameters())
    for key, weight in reference.model.named_parameters():
        difference = float((stored[key].cpu() - weight.cpu()).norm() / weight.norm().clamp(min=1e-30))
        if not difference <= worst:
            worst, where = difference, key
    limit = MAX_ROUNDED[precision]
    told = f"{where} differs most, by {worst:.2%} of its size, expected at most {limit:.0%}"
    return Check(f"{name}: weights", worst <= limit, told, len(stored), {"largest_difference": worst})


def check_answers(reference: Reference, other: Backend) -> Check:
    """Whether greedy answers are the same, apart from near ties."""
    theirs = other.answers(reference.prompts, max_new_tokens=reference.max_new_tokens)
    ties, different, first = 0, 0, ""
    for prompt, ours, found in zip(reference.prompts, reference.answers, theirs, strict=True):
        if list(ours) == found:
            continue
        if (gap := _gap(reference, prompt, ours, found)) < NEAR_TIE:
            ties += 1
        else:
            different += 1
            texts = [reference.tokenizer.decode(answer)[:60] for answer in (ours, found)]
            first = first or f"; the first: {texts[0]!r} here, {texts[1]!r} there, where logits are {gap:.1e} apart"
    equal = len(theirs) - ties - different
    near = f", {ties:,} diverge where two logits are less than {NEAR_TIE:g} apart" if ties else ""
    told = f"{equal:,} of {len(theirs):,} greedy answers{near}{first}"
    return Check(f"{other.name}: answers", not different, told, len(theirs), {"near_ties": ties})


def _gap(reference: Reference, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> float:
    """By how much the model's logit of the other's choice is lower than its largest, where the answers diverge."""
    place = next((place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        place = min(len(ours), len(theirs))
    logits = reference.logits([*prompt, *ours[:place]], last=1)[0]
    chosen = theirs[place : place + 1] or reference.tokenizer.ends
    return float(logits.max() - logits[list(chosen)].max())

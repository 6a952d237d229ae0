"""Whether a model is the same wherever it is opened: each other system beside the model as it was trained.

The systems are stock Transformers (`llm.export.transformers_backend`) and llama.cpp (`llm.export.llama_cpp_backend`). Compared are the tokens of sentences, the
tokens of chats, log-probabilities, and greedy answers. Two systems round differently, so where two tokens are as good as
equally likely the answers may part: that is told, and is no fault.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llm.inference.generate import generate
from llm.models.interface import LanguageModel
from llm.text.documents import language_by_script
from llm.text.selection import evenly_spaced
from llm.tokenizer.tokenizer import ChatMessage, TextTokenizer

NEAR_TIE = 1e-4  # logits closer than this may fall either way
CLOSE = 1e-4  # largest difference of log-probabilities in fp32, as a share of the largest (at least of 1)
# The largest share of probability that moves to other tokens, on average, where weights are stored in fewer bits. Measured on
# the model of the recipe quickstart: 0.03%, 0.2% and 0.9%, and 15% with rotary channels in the wrong order.
MOVED = {"f16": 0.01, "bf16": 0.05, "q8_0": 0.05}

# Always compared: where tokenizers that seem alike come apart.
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


class System(Protocol):
    """A model opened elsewhere."""

    name: str

    def encode(self, text: str) -> list[int]:
        """The text alone."""

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """A chat up to where the assistant is to answer."""

    def log_probabilities(self, tokens: Sequence[int]) -> Tensor:
        """Of what follows the last P of `tokens`, (P, V); NaN where it does not say."""

    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens after each prompt."""


@dataclass(frozen=True)
class Check:
    """What one comparison found; `passed` is None where it could not be made."""

    name: str  # "llama.cpp f32: answers"
    passed: bool | None
    told: str  # what was compared, and the first difference
    compared: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)  # depends on the machine


@dataclass(frozen=True)
class Ours:
    """The model as it was trained, and what it makes of the prompts: every system is held against it."""

    model: LanguageModel
    tokenizer: TextTokenizer
    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    max_new_tokens: int

    @classmethod
    def of(
        cls, model: LanguageModel, tokenizer: TextTokenizer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
    ) -> "Ours":
        """Answers the prompts."""
        answers = generate(model, prompts, max_new_tokens=max_new_tokens, end=tokenizer.ends)
        return cls(model, tokenizer, prompts, answers, max_new_tokens)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits (T, V)."""
        device = self.model.device
        logits: Tensor = self.model(torch.tensor([list(tokens)], device=device))[0]
        return logits.cpu()


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """The sentences of texts, English or Chinese."""
    for text in texts:
        for sentence in _SENTENCE_END.split(text):
            if sentence.strip():
                yield sentence


def balanced(found: Iterable[str], wanted: int) -> dict[str, list[str]]:
    """`wanted` of them at most, without repetition, by language, each with an even share as far as it has so many."""
    languages: dict[str, list[str]] = {}
    for text in dict.fromkeys(found):
        languages.setdefault(language_by_script(text), []).append(text)
    chosen: dict[str, list[str]] = {}
    left = wanted
    for place, (language, texts) in enumerate(sorted(languages.items(), key=lambda item: (len(item[1]), item[0]))):
        chosen[language] = evenly_spaced(texts, left // (len(languages) - place))
        left -= len(chosen[language])
    return {language: texts for language, texts in chosen.items() if texts}


def check_tokens(tokenizer: TextTokenizer, other: System, texts: Sequence[str]) -> Check:
    """Whether the other system cuts every text into the same tokens."""
    return _equal(
        f"{other.name}: tokens", "texts", zip(texts, tokenizer.encode_batch(texts), map(other.encode, texts), strict=True)
    )


def check_chats(tokenizer: TextTokenizer, other: System, chats: Sequence[Sequence[ChatMessage]]) -> Check:
    """Whether the other system renders chats, which end with an answer, into the tokens that were trained."""

    def pairs() -> Iterator[tuple[str, list[int], list[int]]]:
        for chat in chats:
            learned, _ = tokenizer.encode_chat(chat)
            found = other.encode_prompt(chat[:-1])
            yield chat[-2]["content"] if len(chat) > 1 else "", learned[: len(found)], found
            if (whole := getattr(other, "encode_chat", None)) is not None:
                yield chat[-1]["content"], learned, whole(chat)[: len(learned)]

    return _equal(f"{other.name}: chats", "renderings", pairs())


def _equal(name: str, what: str, pairs: Iterable[tuple[str, list[int], list[int]]]) -> Check:
    compared, different, first = 0, 0, ""
    for text, ours, theirs in pairs:
        compared += 1
        if ours != theirs:
            different += 1
            first = first or f"; the first: {text[:60]!r} is {_part(ours, theirs)} here, {_part(theirs, ours)} there"
    told = f"{compared - different:,} of {compared:,} {what}{first}"
    return Check(name, not different, told, compared)


def _part(tokens: Sequence[int], other: Sequence[int]) -> str:
    """A few tokens from where they differ."""
    start = next((place for place, pair in enumerate(zip(tokens, other, strict=False)) if pair[0] != pair[1]), len(other))
    return f"{list(tokens[start : start + 4])} at {start}"


def check_likelihoods(ours: Ours, other: System, texts: Sequence[Sequence[int]], *, precision: str = "f32") -> Check:
    """Whether log-probabilities after `texts` are those of the model: up to rounding, or, in fewer bits, nearly."""
    worst, largest, moved = 0.0, 1.0, 0.0
    for tokens in texts:
        theirs = other.log_probabilities(tokens)
        mine = ours.logits(tokens)[-len(theirs) :].log_softmax(-1)
        said = ~theirs.isnan()
        difference = (mine - theirs)[said].abs()
        if not said.any(-1).all() or not torch.isfinite(difference).all():
            worst = moved = math.inf
            break
        worst = max(worst, float(difference.max()))
        largest = max(largest, float(mine[said].abs().max()))
        moved += float((mine.exp() - theirs.exp())[said].abs().sum() / 2 / len(theirs))
    moved /= max(1, len(texts))
    name = f"{other.name}: likelihoods"
    if precision == "f32":
        told = f"log-probabilities after {len(texts):,} texts differ by at most {worst:.1e}, wanted {CLOSE * largest:.1e}"
        return Check(name, worst <= CLOSE * largest, told, len(texts), {"largest_difference": worst})
    told = f"after {len(texts):,} texts {moved:.2%} of the probability moves, wanted at most {MOVED[precision]:.0%}"
    return Check(name, moved <= MOVED[precision], told, len(texts), {"probability_moved": moved})


def check_answers(ours: Ours, other: System) -> Check:
    """Whether greedy answers are the same, tokens being as good as equally likely aside."""
    theirs = other.answers(ours.prompts, max_new_tokens=ours.max_new_tokens)
    ties, different, first = 0, 0, ""
    for prompt, mine, found in zip(ours.prompts, ours.answers, theirs, strict=True):
        if list(mine) == found:
            continue
        if (gap := _gap(ours, prompt, mine, found)) < NEAR_TIE:
            ties += 1
        else:
            different += 1
            texts = [ours.tokenizer.decode(answer)[:60] for answer in (mine, found)]
            first = first or f"; the first: {texts[0]!r} here, {texts[1]!r} there, where logits are {gap:.1e} apart"
    equal = len(theirs) - ties - different
    near = f", {ties:,} part where two logits are less than {NEAR_TIE:g} apart" if ties else ""
    told = f"{equal:,} of {len(theirs):,} greedy answers{near}{first}"
    return Check(f"{other.name}: answers", not different, told, len(theirs), {"near_ties": ties})


def _gap(ours: Ours, prompt: Sequence[int], mine: Sequence[int], theirs: Sequence[int]) -> float:
    """How much less likely, in logits, the model finds the other's choice where the answers part."""
    place = next((place for place, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        place = min(len(mine), len(theirs))
    logits = ours.logits([*prompt, *mine[:place]])[-1]
    chosen = theirs[place : place + 1] or ours.tokenizer.ends
    return float(logits.max() - logits[list(chosen)].max())

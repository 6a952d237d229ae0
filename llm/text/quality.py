"""Rules of published corpora that tell prose from lists, menus, boilerplate and spam. Pure functions of one cleaned text.

A set of rules is chosen by its name, that of the paper or corpus that published it. The thresholds are the published ones:

* `gopher`: quality of a document, and repetition within it (Rae et al. 2021, arXiv:2112.11446, section A.1 and table A1).
* `c4`: lines that end a sentence, and what marks a page as no prose (Raffel et al. 2020, arXiv:1910.10683, section 2.2).
* `fineweb`: three rules about lines (Penedo et al. 2024, arXiv:2406.17557, section 3.6).

They were made for English pages of the web. Elsewhere a character of a script without spaces counts as a word, and two of them
in runs of words; any script's end of a sentence counts; the rules about English words and the length of words apply only to
texts with spaces.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

RuleSet = Literal["gopher", "c4", "fineweb"]

# A word, or one character of a script that has no spaces: Thai to Khmer, Kana, Han
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u31a0-\u31ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_ONE_UNSPACED = re.compile(rf"[{_UNSPACED}]")
_SENTENCE_ENDS = tuple(".!?\"'”’…。！？」』；۔؟।")
_ENDS_OF_SENTENCES = re.compile(r"[.!?]+(?=[\s\"'”’)]|$)|[。！？۔؟।]+")
_BULLETS = ("-", "*", "•", "‣", "▪", "●", "○", "·", "–")
_ELLIPSES = ("...", "…", "……")
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")

TOP_GRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))  # words, and the share of the characters in the most frequent run
REPEATED_GRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))  # the same in runs that occur again


class Page:
    """A text with its lines, paragraphs and words, each computed when a rule first asks."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not empty, without white space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What empty lines separate."""
        return [paragraph for paragraph in map(str.strip, re.split(r"\n\s*\n", self.text)) if paragraph]

    @cached_property
    def words(self) -> list[str]:
        """Words; or characters in scripts without spaces, where punctuation is no word of its own."""
        return self._tokens if self.has_spaces else [token for token in self._tokens if any(map(str.isalnum, token))]

    @cached_property
    def has_spaces(self) -> bool:
        """Whether most of the words are separated by spaces."""
        return 2 * sum(1 for _ in _ONE_UNSPACED.finditer(self.text)) < len(self._tokens)

    @cached_property
    def _tokens(self) -> list[str]:
        return _WORD.findall(self.text)


def failed_rule(text: str, rule_sets: Sequence[RuleSet]) -> str | None:
    """The first rule that a cleaned text fails, such as "gopher_words"; None if it passes all of `rule_sets`."""
    page = Page(text)
    return next((failed for name in rule_sets if (failed := _RULES[name](page))), None)


def _gopher(page: Page) -> str | None:
    words, lines = page.words, page.lines
    if not 50 <= len(words) <= 100_000:
        return "gopher_words"
    if page.has_spaces and not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "gopher_word_length"
    if (page.text.count("#") + page.text.count("...") + page.text.count("…")) / len(words) > 0.1:
        return "gopher_symbols"
    if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
        return "gopher_bullets"
    if sum(line.endswith(_ELLIPSES) for line in lines) > 0.3 * len(lines):
        return "gopher_ellipses"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "gopher_letters"
    if page.has_spaces and page.text.isascii() and len(_STOP_WORDS.intersection(map(str.lower, words))) < 2:
        return "gopher_stop_words"
    return _gopher_repetition(page)


def _gopher_repetition(page: Page) -> str | None:
    for parts, most in ((page.lines, 0.3), (page.paragraphs, 0.3)):
        repeats = len(parts) - len(set(parts))
        if repeats > most * len(parts):
            return "gopher_repeated_lines"
        if sum(map(len, parts)) - sum(map(len, set(parts))) > 0.2 * len(page.text):
            return "gopher_repeated_lines"
    words = [word.lower() for word in page.words]
    characters = sum(map(len, words))
    scale = 1 if page.has_spaces else 2  # characters of a word in scripts without spaces
    for size, most in TOP_GRAMS:
        runs = zip(*(words[start:] for start in range(size * scale)), strict=False)
        gram, count = Counter(runs).most_common(1)[0]
        if count > 1 and count * sum(map(len, gram)) > most * characters:
            return "gopher_repeated_words"
    for size, most in REPEATED_GRAMS:
        if not (repeated := _repeated(words, size * scale)):
            break  # without a shorter run that occurs again there is no longer one
        if repeated > most * characters:
            return "gopher_repeated_words"
    return None


def _repeated(words: list[str], size: int) -> int:
    """Characters in runs of `size` words that occurred before, each counted once."""
    seen: set[tuple[str, ...]] = set()
    found = place = 0
    while place + size <= len(words):
        gram = tuple(words[place : place + size])
        if gram in seen:
            found += sum(map(len, gram))
            place += size
        else:
            seen.add(gram)
            place += 1
    return found


def _c4(page: Page) -> str | None:
    lowered = page.text.lower()
    if "lorem ipsum" in lowered:
        return "c4_lorem_ipsum"
    if "{" in page.text:
        return "c4_braces"
    sentences = sum(len(_ENDS_OF_SENTENCES.findall(line)) or 1 for line in page.lines if _is_prose(line))
    return "c4_sentences" if sentences < 5 else None


def _is_prose(line: str) -> bool:
    """Whether C4 keeps a line: it ends a sentence, has three words, and is no notice of the site."""
    lowered = line.lower()
    return (
        line.endswith(_SENTENCE_ENDS)
        and not line.endswith("...")
        and len(_WORD.findall(line)) >= 3
        and "javascript" not in lowered
        and not any(policy in lowered for policy in _POLICIES)
    )


def keep_prose(text: str) -> str:
    """The lines of a cleaned text that C4 keeps; an empty line between paragraphs stays."""
    kept = [line for line in text.split("\n") if not line.strip() or _is_prose(line.strip())]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _fineweb(page: Page) -> str | None:
    lines = page.lines
    if sum(line.endswith(_SENTENCE_ENDS) for line in lines) <= 0.12 * len(lines):
        return "fineweb_line_ends"
    if sum(map(len, lines)) - sum(map(len, set(lines))) >= 0.1 * sum(map(len, lines)):
        return "fineweb_repeated_lines"
    short = 30 if page.has_spaces else 10  # characters; about as many words
    if sum(len(line) < short for line in lines) >= 0.67 * len(lines):
        return "fineweb_short_lines"
    return None


_RULES: dict[RuleSet, Callable[[Page], str | None]] = {"gopher": _gopher, "c4": _c4, "fineweb": _fineweb}

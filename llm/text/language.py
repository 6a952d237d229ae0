"""The language of a text, by py3langid: a naive Bayes classifier over runs of bytes, for 97 languages, that needs no network.

Lui and Baldwin 2012, "langid.py: An off-the-shelf language identification tool".
"""

from functools import cache

LOOKED_AT = 1000  # characters of a text
_PARTS = 3


def language_of(text: str) -> str:
    """The ISO 639-1 code of the language that most of `text` is probably in: "en", "zh".

    Three places of a long text are looked at: beginning, middle and end. Texts of a few words are often taken for another
    language.
    """
    if len(text) > LOOKED_AT:
        size = LOOKED_AT // _PARTS
        middle = (len(text) - size) // 2
        text = f"{text[:size]}\n{text[middle : middle + size]}\n{text[-size:]}"
    import py3langid

    code: str = py3langid.classify(text)[0]
    return code


@cache
def known_languages() -> frozenset[str]:
    """The codes that `language_of` may return."""
    import py3langid

    return frozenset(code for code, _ in py3langid.rank(""))

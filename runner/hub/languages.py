"""Codes of languages as the Hub takes them on a card: of ISO 639-1, or of three letters, or one of two words."""

import re

WORDS = frozenset({"code", "multilingual"})
_TWO_LETTERS = """
aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo
es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg
ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn
no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta
te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
ISO_639_1 = frozenset(_TWO_LETTERS.split())


def is_language(code: str) -> bool:
    """Whether the Hub takes `code`. Of three letters only the shape is checked: ISO 639-3 has 7,900."""
    return code in WORDS or code in ISO_639_1 or re.fullmatch("[a-z]{3}", code) is not None


def language_of(name: str) -> str | None:
    """The code in what a row says of its language, such as zh for zh-CN; None if it is none, such as English or Python."""
    code = re.split("[-_]", name.strip().lower())[0]
    return code if is_language(code) else None

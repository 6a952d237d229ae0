"""Texts on which tokenizers that look alike differ: composed forms, marks, scripts, digits, spaces, code and tokens as
text."""

import random
import unicodedata
from collections.abc import Sequence

# One list for each thing that some implementation gets wrong.
PARTS: dict[str, list[str]] = {
    "words": ["the heart", "It's", "we'LL", "DON'T", "you'Re", "HTMLParser", "iPhone", "snake_case", "camelCaseWord", "naïve"],
    "accents": ["café", "Ångström", "Straße", "résumé", "ỹ", "Việt Nam", "İstanbul ıs", "ﬁne ﬀ", "ŉ", "ǅungla", "ʰʷ", "ſharp"],
    "digits": [
        "3", "12", "1234567", "3.14", "1,000,000", "٣٤٥", "१२३", "２０２４", "¼½²³", "Ⅷ Ⅻ", "①②", "0x1F", "1e-5", "H2O",
    ],
    "chinese": ["发烧38.5度", "头痛、咳嗽三天。", "医生说：“多喝水”", "（各7天）", "臺灣", "𠀀𠮷", "々〆", "ＡＢＣ　全角！"],
    "japanese": ["ひらがな", "カタカナー", "ｶﾀｶﾅ", "漢字かな交じり文", "がぎぐ"],
    "korean": ["한국어", "안녕하세요", "각"],
    "thai": ["สวัสดีครับ", "ภาษาไทย", "น้ำ", "ที่นี่"],
    "arabic": ["العربية", "مُحَمَّد", "لا إله", "۱۲۳", "ك‌ت", "عَلَيْكُم"],
    "hebrew": ["שָׁלוֹם", "עברית"],
    "indic": ["हिन्दी", "क्षत्रिय", "বাংলা", "தமிழ்", "తెలుగు", "ಕನ್ನಡ"],
    "cased": ["ПриветМир", "ЭВМ", "Ελληνικά", "ΑΒγ", "Армения", "Հայերեն", "ÀÉîõü", "ÉCOLE"],
    "emoji": ["👩‍⚕️", "💊", "🇨🇳", "👨‍👩‍👧‍👦", "1️⃣", "❤️", "🏳️‍🌈", "☕"],
    "spaces": [
        " ", "  ", "   ", "\t", "\t\t ", "\n", "\n\n", "\n\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u2003",
        "\u2028", " " * 9,
    ],
    "invisible": ["\u200b", "\u200d", "\u200c", "\ufeff", "\u00ad", "\u2060", "\u202e", "\ue000", "\x07", "\x7f", "\u0085"],
    "marks": ["e\u0301", "a\u0308\u0301", "Z\u0351\u0343\u0300", "\u0301", "q\u0323\u0307", "o\u0337"],
    "code": [
        "def f(x):\n    return x ** 2", "if (a&&b)||!c {", "</div>", "<br/>", "a[i]->b::c", "$HOME/.bashrc",
        "{{ x }}", "\\n", "//", "#!",
    ],
    "signs": [
        "!!!", "?!", "...", "—", "“”", "¿¡", "€$£", "±≠∞", "→", "© ®", "`~^", "---", "=====", "_____", "%&*", "¨´", "'", "''s",
    ],
    "addresses": ["https://example.org/a_b?c=d&e=%20f", "a.b@c.de", "C:\\dir\\x", "../x/y.txt", "@user #tag"],
    "metaspace": ["▁", "▁▁a", "a▁b"],
}  # fmt: skip


def hard_sentences(count: int = 1000, *, tokens: Sequence[str] = ()) -> list[str]:
    """`count` distinct texts, always the same; `tokens` are written into some of them."""
    drawn = random.Random(20)
    parts = PARTS | ({"tokens": list(tokens)} if tokens else {})
    found = dict.fromkeys(text for texts in parts.values() for text in texts)
    while len(found) < count:
        kinds = drawn.choices(list(parts), k=drawn.randint(2, 6))
        text = drawn.choice(["", "", " "]).join(
            drawn.choice(parts[kind]) + drawn.choice(["", " ", " ", ".", ", "]) for kind in kinds
        )
        found[unicodedata.normalize(drawn.choice(["NFC", "NFD", "NFC", "NFKD"]), text) if drawn.random() < 0.6 else text] = (
            None
        )
    return list(found)[:count]

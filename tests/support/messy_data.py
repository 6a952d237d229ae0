"""Files as people have them: encodings, separators, forms, empty cells, broken lines, unequal classes."""

import json
from typing import Any

SENTENCES = [f"number {n} of the reviews says that it was {'good and kind' if n % 3 else 'bad and sad'}" for n in range(60)]
GERMAN = "Bewertung;Note\r\n" + "".join(
    f"Größe und Qualität sind {'schön' if n % 2 else 'übel'} {n};{n % 2}\r\n" for n in range(40)
)
CHINESE = "内容,类别\n" + "".join(
    f"这个产品的质量{'非常好，我很满意' if n % 2 else '太差了，要求退货'}第{n}次,{'正面' if n % 2 else '负面'}\n"
    for n in range(40)
)
HALF_EMPTY = "text,label\n" + "".join(
    f"{'' if n % 5 < 2 else text},{'' if n % 7 == 0 else n % 2}\n" for n, text in enumerate(SENTENCES)
)
UNEQUAL = ["a"] * 90 + ["b"] * 9 + ["c"]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


MESSY: dict[str, tuple[str, bytes, str]] = {  # by name: the file, its content, and the kind that is found
    "a European csv of Excel": ("a.csv", GERMAN.encode("cp1252"), "labels"),
    "GB18030": ("a.csv", CHINESE.encode("gb18030"), "labels"),
    "UTF-16": ("a.csv", GERMAN.encode("utf-16"), "labels"),
    "tabs": (
        "a.tsv",
        "".join(f"{text}\t{n % 3}\n" for n, text in enumerate(["text", *SENTENCES])).encode().replace(b"\t0", b"\tlabel", 1),
        "labels",
    ),
    "Alpaca": (
        "a.json",
        json.dumps([{"instruction": text, "input": "", "output": f"yes {n}"} for n, text in enumerate(SENTENCES)]).encode(),
        "pairs",
    ),
    "a JSON array": (
        "a.json",
        json.dumps(
            [{"id": n, "question": text, "answer": f"because {n}"} for n, text in enumerate(SENTENCES)], indent=1
        ).encode(),
        "pairs",
    ),
    "messages": (
        "a.jsonl",
        lines(
            [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "fine"}]} for text in SENTENCES]
        ),
        "chats",
    ),
    "preferences": (
        "a.jsonl",
        lines([{"prompt": text, "chosen": f"yes {n}", "rejected": "no"} for n, text in enumerate(SENTENCES)]),
        "preferences",
    ),
    "ShareGPT": (
        "a.json",
        json.dumps(
            [
                {"id": f"{n}", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "fine"}]}
                for n, text in enumerate(SENTENCES)
            ]
        ).encode(),
        "chats",
    ),
    "preferences with the prompt inside": (
        "a.jsonl",
        lines(
            [
                {"chosen": f"\n\nHuman: {text}?\n\nAssistant: yes {n}", "rejected": f"\n\nHuman: {text}?\n\nAssistant: no"}
                for n, text in enumerate(SENTENCES)
            ]
        ),
        "preferences",
    ),
    "40% empty cells": ("a.csv", HALF_EMPTY.encode(), "labels"),
    "int labels": ("a.jsonl", lines([{"Review Text": text, "stars": n % 3} for n, text in enumerate(SENTENCES)]), "labels"),
    "list labels": (
        "a.jsonl",
        lines([{"text": text, "labels": ["x", "y"][: n % 2 + 1]} for n, text in enumerate(SENTENCES)]),
        "labels",
    ),
    "texts of 4,000 tokens": (
        "a.jsonl",
        lines([{"text": f"{text} " * 220, "label": "xy"[n % 2]} for n, text in enumerate(SENTENCES)]),
        "labels",
    ),
    "classes at 90, 9 and 1": (
        "a.jsonl",
        lines([{"text": f"some text {n} of {label}", "label": label} for n, label in enumerate(UNEQUAL)]),
        "labels",
    ),
    "the same rows again and again": (
        "a.jsonl",
        lines([{"text": text, "label": n % 2} for n, text in enumerate(SENTENCES[:20])] * 5),
        "labels",
    ),
    "broken lines": (
        "a.jsonl",
        lines([{"text": text, "label": n % 2} for n, text in enumerate(SENTENCES)])
        + b'{"text": NaN, "label": 1}\nno\n{"text": "\xff", "label": 0}\n',
        "labels",
    ),
    "numbers of 5,000 digits": (
        "a.jsonl",
        lines([{"text": text, "label": n % 2} for n, text in enumerate(SENTENCES)])
        + b'{"text": "a", "label": '
        + b"9" * 5000
        + b"}\n",
        "labels",
    ),
    "quoted line breaks": (
        "a.csv",
        ("text,label\n" + "".join(f'"{text},\n""yes""",{n % 2}\n' for n, text in enumerate(SENTENCES))).encode(),
        "labels",
    ),
    "a log": ("a.txt", "\n".join(SENTENCES).encode(), "documents"),
}

"""Recipes nobody meant: the shipped ones, changed at random in their tables and in their text. Seeded."""

import copy
import random
import string
from collections.abc import Callable
from typing import Any

import tomli
import tomli_w

STRANGE = [
    "", " ", "\t", "\n", "0", "true", "null", "../../../etc/passwd", "/", "/dev/zero", "/dev/stdin", "/proc/self/mem",
    "~", ".", "..", "*", "**", "**/*", "**/**/**/**", "/**", "[", "[!", "[]]", "{", "}", "{}", "{text", "{text}{",
    "{{text}}", "{0}", "{text.__class__}", "{text!r}", "{text:>999999999}", "%s", "$HOME", "$(id)", "`id`",
    "; rm -rf /", "\x00", "a\x00b", "\x1b[31m", "\u202e", "\ufeff", "😀", "数据", "ｆｕｌｌ", "é" * 3, "é", "a" * 300,
    "a" * 70_000, "a/" * 2_500, "corpus", "base", "stage.base", "extends", "None", "NaN", "inf", "1e999", "-1", "１２",
    "hf://", "s3://x", "file:///etc", "memory://", "http://x", "data/section_train.jsonl.gz", "data", "data/*",
    "data/NOTICE", "quickstart.toml", "recipe.schema.json", ".*", "(a+)+$", "owner/name", "a/b/c", "<script>",
    "{% for x in range(10**9) %}{% endfor %}",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63 - 1, -(2**63), 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e308, -1.5]
NUMBERS += [float("inf"), float("-inf"), float("nan")]
RAW = [
    "[", "]", "[[stage]]", "[stage]", "[stage.base]", "[[stage.base]]", "[cache]\nremote = 'x'", "=", "x = ", "= 1",
    '"', "'''", '"""', "#", "\\", "\\u12", '"\\ud800"', "{", "}", "{a={a={a={a=1}}}}", "[[[[[[[[]]]]]]]]", "," * 50,
    "a.b.c.d.e.f = 1", "name = 1", "name = ''", "extends = 'quickstart.toml'", "extends = 'medical-lora.toml'",
    "extends = 'recipe.toml'", "extends = '/dev/zero'", "1979-05-27T07:32:00Z", "0x_1", "1_000", "+inf", "\r", "\r\n",
    "\x00", "\x7f", "\ufffe", "é = 1", '"é" = 1', '[stage.""]', "[stage.'a b']", "[stage.base.schedule.kind]",
    "[parallel]\nprocesses = 10000000", "x = " + "[" * 500, "x = " + "{a=" * 500,
    "x = " + "[" * 300 + "]" * 300, "x = " + "{a=" * 80 + "1" + "}" * 80, "a." * 900 + "a = 1",
    "[stage.deep]\nkind = 'corpus'\nsources = " + "[" * 200 + "]" * 200,
    "[stage.deep]\nkind = 'corpus'\nsources = [{ where = " + "{a=" * 60 + "1" + "}" * 60 + "}]",
]  # fmt: skip


def mutated(text: str, choose: random.Random, *, kinds: list[str], fields: list[str]) -> bytes:
    """One to a few changes of the recipe `text`."""
    table = tomli.loads(text)
    try:
        for _ in range(choose.choice([1, 1, 1, 2, 3, 5])):
            _change(table, choose, kinds, fields)
        changed = tomli_w.dumps(table)
    except (TypeError, ValueError, RecursionError):  # what TOML, its writer or this one cannot hold
        changed = text
    if choose.random() < 0.3:
        for _ in range(choose.choice([1, 1, 2, 4])):
            changed = _splice(changed, choose)
    data = changed.encode("utf-8", "surrogatepass")
    if choose.random() < 0.03:
        place = choose.randrange(len(data) + 1)
        data = data[:place] + bytes(choose.randrange(256) for _ in range(choose.randrange(1, 5))) + data[place:]
    return data


def _change(table: dict[str, Any], choose: random.Random, kinds: list[str], fields: list[str]) -> None:
    places = list(_places(table))
    if not places:
        table["stage"] = {}
        return
    holder, key = choose.choice(places)
    siblings = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    match choose.randrange(14):
        case 10 | 11 | 12 | 13:
            holder[key] = _near(holder[key], choose)
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[choose.choice([_name(choose), choose.choice(fields), str(key) + "x", str(key)[:-1] or "x"])] = holder.pop(
                key
            )
        case 2 if isinstance(holder, dict):
            holder[choose.choice([_name(choose), choose.choice(fields)])] = copy.deepcopy(holder[key])
        case 3:
            other_holder, other = choose.choice(places)
            holder[key] = copy.deepcopy(other_holder[other])
        case 4 if len(siblings) > 1:
            other = choose.choice(siblings)
            holder[key], holder[other] = holder[other], holder[key]
        case 5:
            holder[key] = _wrapped(holder[key], choose)
        case 6:
            stages = table.get("stage")
            names = list(stages) if isinstance(stages, dict) else []
            holder[key] = choose.choice([*kinds, *names, *fields])
        case 7 if isinstance(holder, dict):
            holder["kind"] = choose.choice([*kinds, "cosine", "adamw", "", 3])
        case _:
            holder[key] = _value(choose)


def _places(value: Any) -> list[tuple[Any, Any]]:
    match value:
        case dict():
            return [place for key, item in value.items() for place in [(value, key), *_places(item)]]
        case list():
            return [place for key, item in enumerate(value) for place in [(value, key), *_places(item)]]
    return []


def _wrapped(value: Any, choose: random.Random) -> Any:
    if choose.random() < 0.1:
        for _ in range(choose.choice([20, 60])):
            value = [value]
        return value
    wraps: list[Callable[[], Any]] = [
        lambda: [value],
        lambda: [value, copy.deepcopy(value)],
        lambda: {"x": value},
        lambda: str(value),
        lambda: [copy.deepcopy(value) for _ in range(50)],
    ]
    return choose.choice(wraps)()


def _value(choose: random.Random) -> Any:
    values: list[Callable[[], Any]] = [
        lambda: choose.choice(STRANGE),
        lambda: choose.choice(NUMBERS),
        lambda: choose.choice([True, False]),
        lambda: [],
        lambda: {},
        lambda: [choose.choice(NUMBERS) for _ in range(3)],
        lambda: {_name(choose): choose.choice(STRANGE)},
        lambda: tomli.loads("x = 1979-05-27T07:32:00Z")["x"],
        lambda: "".join(chr(choose.choice([choose.randrange(32, 127), choose.randrange(160, 0xD800)])) for _ in range(12)),
    ]
    return choose.choice(values)()


def _near(value: Any, choose: random.Random) -> Any:
    """A value that might be meant in place of `value`."""
    match value:
        case bool():
            return not value
        case int() if abs(value) > 10**300:  # no float is as large
            return choose.choice([value + 1, value // 2, -value, str(value)])
        case int() | float():
            return choose.choice([value + 1, value * 2, value / 2, value // 2, value - 1, -value, float(value), str(value)])
        case str():
            return choose.choice([value + "x", value[:-1], value.upper(), f" {value}", value + "\n", value + "数", [value]])
        case list():
            return choose.choice([value[:1], value[1:], value + value[:1], value[::-1]])
        case dict():
            return dict(list(value.items())[::-1])
    return value


def _name(choose: random.Random) -> str:
    return choose.choice(
        ["x", "", " ", "é", "a.b", '"', "数据", "__class__", "kind", "name", "stage", "seed", string.ascii_letters * 3]
    )


def _splice(text: str, choose: random.Random) -> str:
    place, other = choose.randrange(len(text) + 1), choose.randrange(len(text) + 1)
    low, high = min(place, other), min(max(place, other), min(place, other) + 80)
    lines = text.splitlines(keepends=True)
    match choose.randrange(5):
        case 0:
            return text[:place] + choose.choice(RAW) + text[place:]
        case 1:
            return text[:low] + text[high:]
        case 2:
            return text[:high] + text[low:]
        case 3 if lines:
            return "".join([*lines, choose.choice(lines)])
        case _:
            choose.shuffle(lines)
            return "".join(lines)

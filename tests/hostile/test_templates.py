"""Chat templates of strangers: they reach nothing of Python, and neither time nor memory without bound."""

import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from foreign_models import FAMILIES, smollm
from jinja2 import TemplateError
from transformers import AutoTokenizer

from llm.errors import InputError
from llm.export.transformers_backend import TransformersBackend
from llm.tokenizer.chat_template import CHAT_TEMPLATE, render_chats
from llm.tokenizer.stock_template import rendered_by_stock, with_bounded_template
from llm.tokenizer.tokenizer import TextTokenizer

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
CLEAN = "{{ messages[0]['content'] }}"
HOSTILE = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "one long loop": "{% for i in range(1000000000) %}{% endfor %}",
    "loops over text": "{% set t = 'x' * 99999 %}{% for a in t %}{% for b in t %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "memory": "{{ 'x' * 10000000000 }}",
    "doubling": "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "lists": "{% set t = ['x' * 1000000] * 100000 %}{{ t | join }}",
    "width": "{{ '%9999999999d' | format(1) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "power": "{{ (10 ** 1000000000) % 7 }}",
    "long number": "{{ 9 ** 999999 }}",
    "replace": "{% set t = 'a' * 10000 %}{{ t.replace('a', t).replace('a', t) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format to a class": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "self": "{{ self.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "changes a message": "{{ messages.append(1) }}{{ messages.clear() }}",
    "raises": "{{ raise_exception('no') }}",
    "broken": "{% for %}",
    "nested": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "division": "{{ 1 / 0 }}",
}


def rendered(template: str) -> str:
    """The text of a chat; InputError if it is refused."""
    (found,) = render_chats([{"messages": CHAT}], template, TOKENS)
    if isinstance(found, InputError):
        raise found
    return found[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_runs_away_or_climbs_out_is_an_error(name: str) -> None:
    assert rendered(CLEAN) == "hello"  # the process has started
    used = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.process_time()
    with pytest.raises(InputError, match="the chat template "):
        rendered(HOSTILE[name])
    assert time.process_time() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used.ru_maxrss < 100 * 2**10  # here
    assert rendered(CLEAN) == "hello"


@pytest.mark.parametrize("template", ["{{ messages | attr('__class__') }}", "{{ raise_exception.__globals__ }}", "{{ x }}"])
def test_what_the_sandbox_hides_is_nothing(template: str) -> None:
    assert rendered("a{# is #}" + template) == "a"


def test_memory_and_time_of_the_process_are_bounded() -> None:
    assert rendered(CLEAN) == "hello"
    for name in ("memory", "doubling", "lists", "loops", "recursion"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with pytest.raises(InputError):
            rendered(HOSTILE[name])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime - before.ru_utime < 8  # with its imports, if it was ended
        assert after.ru_maxrss < 1500 * 2**10


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}])
def test_a_template_renders_the_same_apart(options: dict[str, bool], marked: bool) -> None:
    chats = [CHAT, [{"role": "system", "content": "中文 \u2028 ' \" \\"}, *CHAT]] * 20
    requests = [{"messages": chat, "options": options} for chat in chats]
    ours = render_chats(requests, CHAT_TEMPLATE, TOKENS, marked=marked)
    assert render_chats(requests, CHAT_TEMPLATE + "{# another #}", TOKENS, marked=marked) == ours
    found = ours[0]
    assert not isinstance(found, InputError)
    assert [found[0][slice(*span)] for span in found[1]] == ["hi<|end|>"] * marked


def test_a_chat_that_the_template_refuses_does_not_take_others_with_it() -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('too long') }}{% endif %}{{ messages[0].content }}"
    short, long = render_chats([{"messages": CHAT[:1]}, {"messages": CHAT}], template, TOKENS)
    assert (short, str(long)) == (("hello", []), "the chat template refuses this chat: too long")


ROUTES: dict[str, Callable[[Path], object]] = {
    "chat and serve": lambda folder: TextTokenizer.load(folder).encode_prompt(CHAT[:1]),
    "training and inspect": lambda folder: TextTokenizer.load(folder).encode_chat(CHAT),
    "parity, prompts": lambda folder: TransformersBackend(folder, ends=[0], padding=0).encode_prompt(CHAT[:1]),
    "parity, chats": lambda folder: TransformersBackend(folder, ends=[0], padding=0).encode_chat(CHAT),
    "lm-eval": lambda folder: with_bounded_template(AutoTokenizer.from_pretrained(folder)).apply_chat_template(CHAT),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["memory", "loops", "class"])
def test_every_route_renders_a_strangers_template_in_its_process(route: str, name: str, tmp_path: Path) -> None:
    smollm(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(HOSTILE[name])
    assert rendered(CLEAN) == "hello"
    begun = time.process_time()
    with pytest.raises((InputError, TemplateError), match="the chat template "):
        ROUTES[route](tmp_path)
    assert time.process_time() - begun < 2
    assert rendered(CLEAN) == "hello"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_is_rendered_as_stock_transformers_does(family: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FAMILIES[family](tmp_path))
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
        expected = tokenizer.apply_chat_template(CHAT, tokenize=False, **options)
        assert rendered_by_stock(tokenizer, CHAT, **options) == expected
        same = tokenizer.apply_chat_template(CHAT, return_dict=False, **options)
        assert tokenizer(expected, add_special_tokens=False).input_ids == same


def test_nothing_else_calls_the_template_of_transformers() -> None:
    written = [path for name in ("llm", "runner") for path in (ROOT / name).rglob("*.py")]
    calling = {path.name for path in written if ".apply_chat_template(" in path.read_text(encoding="utf-8")}
    assert calling <= {"model_card_usage.py"}, "whose text it is"

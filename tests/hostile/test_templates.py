"""Chat templates of strangers: they reach nothing of Python, and neither time nor memory without bound."""

import resource
import time

import pytest

from llm.errors import InputError
from llm.tokenizer.chat_template import CHAT_TEMPLATE, render_chats, render_with_spans

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
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


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_runs_away_or_climbs_out_is_an_error(name: str) -> None:
    render_chats([CHAT], "{{ messages[0]['content'] }}", special_tokens=TOKENS)  # the process has started
    used = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.process_time()
    with pytest.raises(InputError, match="the chat template "):
        render_chats([CHAT], HOSTILE[name], special_tokens=TOKENS)
    assert time.process_time() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used.ru_maxrss < 100 * 2**10  # here
    assert render_chats([CHAT], "{{ messages[0]['content'] }}", special_tokens=TOKENS) == ["hello"]


@pytest.mark.parametrize("template", ["{{ messages | attr('__class__') }}", "{{ raise_exception.__globals__ }}", "{{ x }}"])
def test_what_the_sandbox_hides_is_nothing(template: str) -> None:
    assert render_chats([CHAT], "a{# is #}" + template, special_tokens=TOKENS) == ["a"]


def test_memory_and_time_of_the_process_are_bounded() -> None:
    render_chats([CHAT], "{{ messages[0]['content'] }}", special_tokens=TOKENS)
    for name in ("memory", "doubling", "lists", "loops", "recursion"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with pytest.raises(InputError):
            render_chats([CHAT], HOSTILE[name], special_tokens=TOKENS)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime - before.ru_utime < 8  # with its imports, if it was ended
        assert after.ru_maxrss < 1500 * 2**10


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_template_renders_the_same_apart(add_generation_prompt: bool) -> None:
    chats = [CHAT, [{"role": "system", "content": "中文 \u2028 ' \" \\"}, *CHAT]] * 20
    options = {"special_tokens": TOKENS, "add_generation_prompt": add_generation_prompt}
    ours = render_chats(chats, CHAT_TEMPLATE, **options)  # type: ignore[arg-type]  # two kinds of options
    assert render_chats(chats, CHAT_TEMPLATE + "{# another #}", **options) == ours  # type: ignore[arg-type]  # as above


def test_spans_are_the_same_apart() -> None:
    import re

    special = re.compile(r"<\|\w+\|>")
    ours = render_with_spans([CHAT, CHAT], CHAT_TEMPLATE, special_tokens=TOKENS, any_special=special)
    assert render_with_spans([CHAT, CHAT], CHAT_TEMPLATE + "{# x #}", special_tokens=TOKENS, any_special=special) == ours
    assert [text[slice(*spans[0])] for text, spans in ours] == ["hi<|end|>"] * 2

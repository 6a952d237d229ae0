"""The Modelfile for Ollama: its template, run by a small interpreter of Go's language, renders what the model's own
renders."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import foreign_models
import pytest
from tiny_release import PROMPTS, tiny_checkpoint

from llm.export.ollama import NO_SYSTEM, NO_TEMPLATE, find_frame, modelfile
from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
from llm.tokenizer.chat_template import ASSISTANT, END, SYSTEM, USER
from llm.tokenizer.tokenizer import TextTokenizer

OPEN, CLOSE = "{{ .Content }}", "{{ end }}"
GREEDY = {"do_sample": False}
SYSTEM_TURN = {"role": "system", "content": "Answer briefly."}

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set text = messages[0]['content'] | trim %}"
    "{% set turns = messages[1:] %}{% else %}{% set text = '' %}{% set turns = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n' + text + '<|eot_id|>' }}"
    "{% for m in turns %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
    "'<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": foreign_models.CHATML_TEMPLATE.replace("{% if loop.first and messages[0]['role'] != 'system' %}", "{% if 0 %}"),
    "chatml with a default system text": foreign_models.CHATML_TEMPLATE,
    "llama 3": LLAMA_3,
    "llama 2": foreign_models.LLAMA_2_TEMPLATE,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi": PHI,
    "zephyr": foreign_models.ZEPHYR_TEMPLATE,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def go(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Go's text/template writes, of the language that is used here: range, if, else if, eq, ne, and, index."""
    parts = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)

    def value(term: str, at: int, dot: Mapping[str, str] | None) -> object:
        term = term.strip()
        if term.startswith("(index "):
            return messages[0]["role"]
        if term == "$i":
            return at
        if term == ".Role":
            assert dot is not None
            return dot["role"]
        return int(term) if term.isdigit() else term.strip('"')

    def holds(condition: str, at: int, dot: Mapping[str, str] | None) -> bool:
        if both := re.fullmatch(r"and \((.*?)\) \((.*)\)", condition):
            return all(holds(one, at, dot) for one in both.groups())
        name, rest = condition.split(" ", 1)
        left, right = re.fullmatch(r"(\(.*?\)\.Role|\S+) (.*)", rest).groups()  # type: ignore[union-attr]  # or it fails
        return (value(left, at, dot) == value(right, at, dot)) == (name == "eq")

    def run(start: int, at: int, dot: Mapping[str, str] | None, *, live: bool) -> tuple[str, int]:
        """The text from `start` to the end of the block, and where that is."""
        written, place = "", start
        while place < len(parts):
            part, place = parts[place], place + 1
            if not part.startswith("{{"):
                written += part if live else ""
                continue
            action = part[2:-2].strip()
            if action == "end":
                return written, place
            if action.startswith("range"):
                for number, message in enumerate(messages):
                    text, after = run(place, number, message, live=live)
                    written += text
                place = after
            elif action.startswith("if"):
                text, place = branches(action.removeprefix("if "), place, at, dot, live=live)
                written += text
            elif action.startswith("else"):
                return written, place - 1
            elif action == ".Content":
                written += dot["content"] if live and dot is not None else ""
        return written, place

    def branches(condition: str, place: int, at: int, dot: Mapping[str, str] | None, *, live: bool) -> tuple[str, int]:
        chosen, result = False, ""
        while True:
            now = live and not chosen and (condition == "" or holds(condition, at, dot))
            text, place = run(place, at, dot, live=now)
            result, chosen = result + text, chosen or now
            if parts[place - 1][2:-2].strip() == "end":
                return result, place
            condition = parts[place][2:-2].strip().removeprefix("else").strip().removeprefix("if ").strip()
            place += 1

    return run(0, 0, None, live=True)[0]


def test_the_modelfile_has_the_file_the_template_the_ends_and_the_context(tokenizer: TextTokenizer) -> None:
    turns = [
        f'{{{{ if eq .Role "system" }}}}{SYSTEM}{OPEN}',
        f'{{{{ else if eq .Role "user" }}}}{USER}{OPEN}',
        f'{{{{ else if eq .Role "assistant" }}}}{ASSISTANT}{OPEN}{END}',
    ]
    assert modelfile(tokenizer, "model-F32.gguf", context=128, sampling=GREEDY, adds_begin=True).splitlines() == [
        "FROM ./model-F32.gguf",
        f'TEMPLATE """{{{{ range .Messages }}}}{"".join(turns)}{CLOSE}{CLOSE}{ASSISTANT}"""',
        f'PARAMETER stop "{END}"',
        "PARAMETER num_ctx 128",
        "PARAMETER temperature 0",
    ]


def test_the_modelfile_samples_as_the_publisher_does(tokenizer: TextTokenizer) -> None:
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}
    lines = modelfile(tokenizer, "m.gguf", context=128, sampling=sampling, adds_begin=True).splitlines()
    assert [line.removeprefix("PARAMETER ") for line in lines[4:]] == [
        "temperature 0.6",
        "top_k 50",  # what stock Transformers does where the publisher says nothing
        "top_p 0.95",
        "repeat_penalty 1.05",
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_in_go_renders_what_the_model_s_own_renders(tokenizer: TextTokenizer, name: str) -> None:
    own = tokenizer.with_template(TEMPLATES[name])
    begins = own.render(PROMPTS[0]).startswith("<|begin|>") and name not in ("llama 2",)
    frame = find_frame(own, adds_begin=begins)
    assert frame is not None
    template = frame.go_template()
    chats = [list(chat) for chat in PROMPTS]
    if frame.system is not None:
        chats += [[SYSTEM_TURN, *chat] for chat in PROMPTS]
    assert (frame.system is None) == (name in ("llama 2", "mistral"))
    for chat in chats:
        rendered = own.render(chat, add_generation_prompt=True)
        assert go(template, chat) == (rendered.removeprefix("<|begin|>") if begins else rendered)
        assert frame.render(chat) == go(template, chat)


def test_a_default_system_text_is_that_of_the_template(tmp_path: Path) -> None:
    import_checkpoint(inspect_checkpoint(foreign_models.FAMILIES["smollm"](tmp_path / "source")), tmp_path / "model")
    frame = find_frame(TextTokenizer.load(tmp_path / "model"), adds_begin=False)
    assert frame is not None
    assert frame.go_template() == (
        '{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nBe helpful.<|im_end|>\n{{ end }}{{ range '
        ".Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}'
        '{{ else if eq .Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_does_more_is_told(tokenizer: TextTokenizer) -> None:
    """It numbers the turns."""
    numbering = "{% for m in messages %}{{ '<|user|>' ~ loop.index ~ m['content'] ~ '<|end|>' }}{% endfor %}"
    own = tokenizer.with_template(numbering)
    assert find_frame(own, adds_begin=False) is None
    text = modelfile(own, "m.gguf", context=128, sampling=GREEDY, adds_begin=False)
    assert text.startswith(f'FROM ./m.gguf\n{NO_TEMPLATE}\nPARAMETER stop "<|end|>"\n')


@pytest.mark.parametrize("otherwise", ["{{ raise_exception('no') }}", ""])  # refused, or dropped without a word
def test_a_template_without_a_system_turn_is_told(tokenizer: TextTokenizer, otherwise: str) -> None:
    own = tokenizer.with_template(MISTRAL.replace("{{ raise_exception('no') }}", otherwise))
    lines = modelfile(own, "m.gguf", context=128, sampling=GREEDY, adds_begin=False).splitlines()
    assert lines[1] == NO_SYSTEM and lines[2].startswith("TEMPLATE")
    frame = find_frame(own, adds_begin=False)
    assert frame is not None and frame.system is None


@pytest.mark.parametrize(
    "template", [*TEMPLATES.values(), "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}"]
)
def test_every_line_of_a_modelfile_is_an_instruction_or_a_comment(tokenizer: TextTokenizer, template: str) -> None:
    text = modelfile(tokenizer.with_template(template), "m.gguf", context=128, sampling=GREEDY, adds_begin=False)
    outside = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
    assert all(line.startswith(("FROM ", "TEMPLATE ", "PARAMETER ", "#")) for line in outside.splitlines())


def test_every_token_that_ends_an_answer_stops_ollama(tmp_path: Path) -> None:
    import_checkpoint(inspect_checkpoint(foreign_models.FAMILIES["llama-3"](tmp_path / "source")), tmp_path / "model")
    own = TextTokenizer.load(tmp_path / "model")
    text = modelfile(own, "m.gguf", context=128, sampling=GREEDY, adds_begin=False)
    assert [line for line in text.splitlines() if "stop" in line] == [
        'PARAMETER stop "<|eot_id|>"',
        'PARAMETER stop "<|end_of_text|>"',
    ]

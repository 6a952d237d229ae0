"""The Modelfile for Ollama: its template renders the same as the model's chat template."""

from pathlib import Path

import foreign_models
import pytest
from tiny_release import PROMPTS, tiny_checkpoint

from llm.export.ollama import find_frame, modelfile
from llm.models.import_checkpoint import import_checkpoint, inspect_checkpoint
from llm.tokenizer.chat_template import ASSISTANT, END, SYSTEM, USER
from llm.tokenizer.tokenizer import TextTokenizer

OPEN, CLOSE = "{{ .Content }}", "{{ end }}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def test_the_modelfile_has_the_file_the_template_the_ends_and_the_context(tokenizer: TextTokenizer) -> None:
    turns = [
        f'{{{{ if eq .Role "system" }}}}{SYSTEM}{OPEN}',
        f'{{{{ else if eq .Role "user" }}}}{USER}{OPEN}',
        f'{{{{ else if eq .Role "assistant" }}}}{ASSISTANT}{OPEN}{END}',
    ]
    assert modelfile(tokenizer, "model-F32.gguf", context=128, adds_begin=True).splitlines() == [
        "FROM ./model-F32.gguf",
        f'TEMPLATE """{{{{ range .Messages }}}}{"".join(turns)}{CLOSE}{CLOSE}{ASSISTANT}"""',
        f'PARAMETER stop "{END}"',
        "PARAMETER num_ctx 128",
        "PARAMETER temperature 0",
    ]


@pytest.mark.parametrize("chat", PROMPTS)
def test_the_frame_around_texts_rebuilds_chats(tokenizer: TextTokenizer, chat: list[dict[str, str]]) -> None:
    frame = find_frame(tokenizer, adds_begin=True)
    assert frame is not None
    around = {"user": (frame.user, ""), "assistant": frame.assistant}
    turns = [around[turn["role"]][0] + turn["content"] + around[turn["role"]][1] for turn in chat]
    rendered = tokenizer.render(chat, add_generation_prompt=True)
    assert "<|begin|>" + "".join(turns) + frame.assistant[0] == rendered


def test_a_template_that_does_more_is_left_to_ollama(tmp_path: Path) -> None:
    """It adds a system turn if a chat has none."""
    import_checkpoint(inspect_checkpoint(foreign_models.FAMILIES["smollm"](tmp_path / "source")), tmp_path / "model")
    tokenizer = TextTokenizer.load(tmp_path / "model")
    assert find_frame(tokenizer, adds_begin=False) is None
    assert modelfile(tokenizer, "m.gguf", context=128, adds_begin=False).splitlines()[1] == 'PARAMETER stop "<|im_end|>"'

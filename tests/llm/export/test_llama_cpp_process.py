"""llama.cpp in its process: a file with a template that runs away, or that is none, ends with words and within bounds."""

import json
import time
from pathlib import Path

import pytest
from tiny_release import PROMPTS, open_in_llama_cpp, tiny_checkpoint

from llm.errors import InputError
from llm.export import llama_cpp_backend
from llm.export.gguf import write_gguf


def written(folder: Path, template: str) -> Path:
    """The GGUF file of a tiny model with this chat template."""
    path = tiny_checkpoint(folder) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}), encoding="utf-8")
    write_gguf(folder, folder / "model.gguf", precision="f32")
    return folder / "model.gguf"


RUNAWAY = "{% if messages[0]['content'] == '" + PROMPTS[0][0]["content"] + "' %}"
LOOPS = "{% for i in range(99999999) %}{% for j in range(99999999) %}{% endfor %}{% endfor %}"
GROWS = "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"


@pytest.mark.parametrize("body", [LOOPS, GROWS], ids=["loops", "grows"])
def test_a_template_that_runs_away_in_llama_cpp_ends_with_words(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp_backend, "TEMPLATE_SECONDS", 1.0)
    gguf = written(tmp_path, RUNAWAY + body + "{% endif %}{{ messages[0]['content'] }}")
    other = open_in_llama_cpp(gguf, tmp_path)
    assert other.encode_prompt(PROMPTS[1])
    begun = time.process_time()
    with pytest.raises(InputError, match="too much time or memory"):
        other.encode_prompt(PROMPTS[0])
    assert time.process_time() - begun < 1


def test_a_file_that_is_none_is_an_error_of_llama_cpp(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(InputError, match="opens"):
        open_in_llama_cpp(tmp_path / "model.gguf", tmp_path)

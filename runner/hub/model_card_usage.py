"""The section of a model card on use with Transformers, PEFT, llama.cpp and Ollama."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm.text.templates import split_template

TRANSFORMERS = [
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'path = "."  # this folder, or the name of this repository',
    "tokenizer = AutoTokenizer.from_pretrained(path)",
    "model = AutoModelForCausalLM.from_pretrained(path)",
    'chat = [{"role": "user", "content": "..."}]',
    'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
    "output = model.generate(**inputs, max_new_tokens=200)",
    'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
]


Records = Mapping[str, Mapping[str, Any]]


def usage(recipe: Mapping[str, Any], records: Records, publish: Mapping[str, Any]) -> str:
    """The section as Markdown. `publish` are the fields of the publish stage."""
    parts = ["## Use", "With Transformers:", _code("python", TRANSFORMERS)]
    if adapter := publish.get("adapter"):
        parts += _with_peft(recipe, records, str(adapter), str(publish["model"]))
    if gguf := publish.get("gguf"):
        parts += _with_llama_cpp(recipe["stage"][gguf]["precisions"])
    return "\n\n".join([*parts, *_prompts(recipe)]) + "\n"


def _with_peft(recipe: Mapping[str, Any], records: Records, adapter: str, model: str) -> Iterable[str]:
    trained_on = recipe["stage"][adapter]["base"]
    if trained_on == model:
        base, where = ".", "the model of this repository"
    elif repo := _hub_base(records, adapter):
        base, where = repo, f"[{repo}](https://huggingface.co/{repo}), on which it was trained"
    else:
        base, where = (
            "path/to/base",
            f"what the stage `{trained_on}` makes (`run path recipe.toml {trained_on}` names the folder)",
        )
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, ".", subfolder="adapter")',
    ]
    yield f"The adapter alone is in `adapter`, for PEFT. Its base is {where}:"
    yield _code("python", lines)


def _hub_base(records: Records, adapter: str) -> str | None:
    """The Hub repository of the model that an adapter was trained on, if it came from there."""
    for name in records[adapter].get("inputs", {}):
        if records.get(name, {}).get("kind") == "checkpoint" and (repo := records[name]["metrics"].get("repo")):
            return str(repo)
    return None


def _with_llama_cpp(precisions: Sequence[str]) -> Iterable[str]:
    files = ", ".join(f"`model-{precision.upper()}.gguf`" for precision in precisions)
    yield f"With llama.cpp ({files}):"
    yield _code("sh", [f"llama-cli -m model-{precisions[0].upper()}.gguf"])
    yield "With Ollama, in this folder:"
    yield _code("sh", ["ollama create my-model -f Modelfile", "ollama run my-model"])


def _prompts(recipe: Mapping[str, Any]) -> Iterable[str]:
    """The prompt templates that the model was trained with; it answers worse with others."""
    tables = [table for fields in recipe["stage"].values() for table in fields.get("data", ())]
    wordings = dict.fromkeys(prompt for table in tables if any(split_template(prompt := table.get("prompt", "{prompt}"))[::2]))
    for wording in wordings:
        yield "For what is in braces, it was taught this prompt:"
        yield _code("", [wording])


def _code(language: str, lines: Sequence[str]) -> str:
    fence = "`" * max([3, *(len(run) + 1 for line in lines for run in re.findall("`+", line))])
    return "\n".join([f"{fence}{language}", *lines, fence])

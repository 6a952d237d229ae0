"""Task files for lm-eval from strangers: no key at any depth reaches code, and no template or pattern runs away."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm.errors import InputError
from llm.evaluation.lm_eval_tasks import local_task, read_yaml

GOOD = {
    "task": "organs",
    "dataset_path": "json",
    "dataset_kwargs": "{ data_files: { test: organs.jsonl } }",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "\"{% for c in choices %}{{ c.replace('[]', '') }} {% endfor %}{{ question.strip() }}\"",
    "doc_to_target": "answer",
    "generation_kwargs": "{ until: ['.'], max_gen_toks: 8, temperature: 0.5, do_sample: true }",
    "filter_list": "[{ name: first, filter: [{ function: regex, regex_pattern: '[a-z]+', group_select: -1 }] }]",
    "metric_list": "[{ metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true }]",
    "metadata": "{ version: 1.0 }",
}
GENERATION = [
    "custom_generate: owner/evil",
    "trust_remote_code: true",
    "assistant_model: owner/evil",
    "prompt_lookup_num_tokens: 3",
    "generation_config: x",
    "logits_processor: x",
    "cache_implementation: static",
    "compile_config: {}",
    "max_length: 1",
    "max_gen_toks: 1000000000",
    "num_beams: 100000",
    "until: 3",
    "temperature: .nan",
    "top_k: -1",
]
HOSTILE = [
    *(("generation_kwargs", f"{{ {one} }}") for one in GENERATION),
    ("metric_list", "[{ metric: acc, hf_evaluate: true }]"),
    ("metric_list", "[{ metric: ../evil }]"),
    ("metric_list", "[{ metric: owner/evil }]"),
    ("metric_list", "[{ metric: acc, compute_fn: os.system }]"),
    ("metric_list", "[{ metric: exact_match, regexes_to_ignore: ['(a+)+$'] }]"),
    ("metric_list", "{ metric: acc }"),
    ("filter_list", "[{ name: x, filter: [{ function: regex, regex_pattern: '(a+)+$' }] }]"),
    ("filter_list", "[{ name: x, filter: [{ function: regex, regex_pattern: '((a|b)*c?)*d' }] }]"),
    ("filter_list", "[{ name: x, filter: [{ function: regex, regex_pattern: '(a{1,9999}){1,9999}' }] }]"),
    ("filter_list", "[{ name: x, filter: [{ function: regex, regex_pattern: '[' }] }]"),
    ("filter_list", "[{ name: x, filter: [{ function: custom, filter_fn: os.system }] }]"),
    ("filter_list", "[{ name: ../x, filter: [] }]"),
    ("filter_list", "[{ name: x, filter: [{ function: take_first_k, k: 1000000000 }] }]"),
    ("metadata", "{ tokenizer: { trust_remote_code: true } }"),
    ("dataset_name", "../../evil"),
    ("dataset_kwargs", "{ data_files: organs.jsonl, cache_dir: /tmp }"),
    ("dataset_kwargs", "{ data_files: organs.jsonl, storage_options: {} }"),
    ("dataset_kwargs", "{ data_files: '*.jsonl' }"),
    ("dataset_kwargs", "{ data_files: 'hf://datasets/owner/evil/x.jsonl' }"),
    ("dataset_kwargs", "{ data_files: 'zip://organs.jsonl::https://x/y.zip' }"),
    ("dataset_kwargs", "{ data_files: { test: [organs.jsonl, /etc/passwd] } }"),
    ("doc_to_text", "\"{{ 'a' * 10000000000 }}\""),
    ("doc_to_text", '"{{ 10 ** 1000000000 }}"'),
    ("doc_to_text", "\"{{ '%9999999999d' % 1 }}\""),
    ("doc_to_text", "\"{{ '{:>9999999999}'.format(1) }}\""),
    ("doc_to_text", '"{{ question.ljust(9999999999) }}"'),
    ("doc_to_text", '"{{ question | center(9999999999) }}"'),
    ("doc_to_text", "\"{{ question | regex_replace('(a+)+$', '') }}\""),
    ("doc_to_text", "\"{{ question | replace('', question) }}\""),
    ("doc_to_text", "\"{{ question.replace('a', 'aaaaaaaaaa').replace('a', 'aaaaaaaaaa') }}\""),
    ("doc_to_text", '"{% for a in question %}{% for b in question %}{{ a }}{% endfor %}{% endfor %}"'),
    ("doc_to_text", '"{% for i in range(1000000000) %}{{ i }}{% endfor %}"'),
    ("doc_to_text", '"{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}"'),
    ("doc_to_text", '"{% set x = question %}{{ x }}"'),
    ("doc_to_text", "\"{% include '/etc/passwd' %}\""),
    ("doc_to_text", "\"{% import 'os' as os %}\""),
    ("doc_to_text", '"{{ cycler.__init__.__globals__.os }}"'),
    ("doc_to_text", f'"{"{{ (" * 3000}"'),
    ("description", '"{{ namespace() }}"'),
    ("doc_to_image", "[x]"),
    ("process_results", "x"),
    ("custom_dataset", "x"),
    ("fewshot_config", "{ sampler: x }"),
    ("unsafe_code", "true"),
    ("include", "../../other.yaml"),
    ("use_prompt", "promptsource:x"),
    ("group", "x"),
]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: str) -> Path:
        (tmp_path / "organs.jsonl").write_text('{"question": "a", "choices": ["b"], "answer": "b"}\n')
        (tmp_path / "organs.yaml").write_text("".join(f"{key}: {value}\n" for key, value in {**GOOD, **changes}.items()))
        return tmp_path

    return write


def test_a_task_with_every_usual_key_is_taken(written: Callable[..., Path]) -> None:
    task = local_task(written(), "organs")
    assert task["generation_kwargs"] == {"until": ["."], "max_gen_toks": 8, "temperature": 0.5, "do_sample": True}
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).is_absolute()


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_a_key_that_reaches_code_or_runs_away_is_refused(key: str, value: str, written: Callable[..., Path]) -> None:
    folder = written(**{key: value})
    begun = time.process_time()
    if value.startswith("[{ name: x, filter: [{ function: custom"):
        with pytest.raises(InputError, match="filter_fn"):
            local_task(folder, "organs")
    with pytest.raises(InputError, match=r"organs\.yaml: .*"):
        local_task(folder, "organs")
    assert time.process_time() - begun < 1


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "task: !!python/object/apply:os.system [id]",
        "task: !!python/name:os.system",
        "task: !function evil.run",
        "task: organs\n<<: !include /etc/passwd",
        "[" * 5000,
        "{a: " * 5000,
        "- " * 5000,
        "task: x\n" + "#" * (2**20),
        "task: '\x01'",
        "task: 2001-99-99",
    ],
    ids=range(11),
)
def test_yaml_that_names_code_or_grows_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "organs.yaml").write_text(text)
    begun = time.process_time()
    with pytest.raises(InputError):
        read_yaml(tmp_path / "organs.yaml")
    assert time.process_time() - begun < 2


@pytest.mark.filterwarnings("default")  # lm-eval's own
@pytest.mark.parametrize("name", ["evil.yaml", "evil.yml", "./evil.yaml", "{folder}/evil.yaml", "{folder}/evil"])
def test_a_benchmark_is_never_the_path_of_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval reads such a file with `!function`, which imports the Python file beside it."""
    from llm.evaluation.lm_eval_harness import _load_tasks

    said = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(said)!r}, 'w')\ndef run(docs): return docs\n")
    (tmp_path / "evil.yaml").write_text("task: evil\ndataset_path: json\nprocess_docs: !function evil.run\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected a task of lm-eval, got an unknown one"):
        _load_tasks(name.format(folder=tmp_path), None, shots=0, scratch=tmp_path)
    assert not said.exists()


@pytest.mark.long  # lm-eval reads all its task files
@pytest.mark.filterwarnings("default")
def test_a_task_of_lm_eval_that_fetches_code_from_the_hub_is_refused(tmp_path: Path) -> None:
    """`humaneval` loads the metric `code_eval`, a script on the Hub, when its module is imported."""
    import evaluate

    from llm.evaluation.lm_eval_harness import evaluate_folder

    load = evaluate.load
    options: dict[str, Any] = {"tasks": None, "shots": 0, "chat": False, "limit": 1}
    with pytest.raises(Exception, match="fetches no code"):
        evaluate_folder(tmp_path, "humaneval", scratch=tmp_path, **options)
    assert evaluate.load is load

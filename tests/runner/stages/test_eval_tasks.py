"""The tasks of an evaluation beyond text and answers: multiple choice, labels of the files of GLUE, and lm-eval."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from random_model import random_model

from llm.data.choices import ChoiceTemplate
from llm.errors import InputError
from llm.evaluation.lm_eval_tasks import local_task
from llm.inference.likelihood import Choice, continuation_likelihoods
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.tokenizer.tokenizer import TextTokenizer
from runner.graph import input_files
from runner.input_files import InputFile, InputFolder
from runner.stage import Context, Parallel
from runner.stages.evaluate import Evaluate

CHOICES = [
    {"question": "What pumps?", "choices": ["the heart", "a liver"], "answer": 0},
    {"question": "What filters?", "choices": ["a heart that beats", "the liver", "blood"], "answer": "B"},
    {"question": "What is red?", "choices": {"text": ["blood", "bone"], "label": ["1", "2"]}, "answer": "1"},
    {"question": "What is hard?", "choices": ["blood", "bone"], "answer": "bone"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = "the heart pumps blood, the liver filters it"
    return random_model(tmp_path_factory.mktemp("checkpoint"), [text], 290, seed=1)


@pytest.fixture
def score(checkpoint: Path, make_context: Callable[..., Context]) -> Callable[..., tuple[dict[str, float], dict[str, Any]]]:
    """Runs an evaluation of one task; its scores and its facts."""

    def run(task: dict[str, Any] | str, **fields: Any) -> tuple[dict[str, float], dict[str, Any]]:
        context = make_context(inputs={"base": checkpoint})
        stage = Evaluate.model_validate({"model": "base", "tasks": [task], **fields})
        metrics = stage.run(context)
        assert json.loads((context.work / "scores.json").read_text())["scores"] == metrics["scores"]
        (facts,) = metrics["tasks"].values()
        return metrics["scores"], {**facts, "intervals": metrics["intervals"]}

    return run


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_likeliest_choice_is_scored_in_total_and_per_byte(
    checkpoint: Path, score: Callable[..., Any], tmp_path: Path
) -> None:
    files = lines(tmp_path / "rows.jsonl", CHOICES)
    scores, facts = score({"name": "exam", "task": "multiple_choice", "files": files})
    assert facts["chance"] == pytest.approx((0.5 + 1 / 3 + 0.5 + 0.5) / 4, abs=1e-4)

    model, tokenizer = load_checkpoint(checkpoint), TextTokenizer.load(checkpoint)
    right = {"accuracy": 0, "accuracy_per_byte": 0}
    for row, answer in zip(CHOICES, [0, 1, 0, 1], strict=True):
        choices: Any = row["choices"]
        texts = choices["text"] if isinstance(choices, dict) else choices
        prompt = tokenizer.encode_prompt([{"role": "user", "content": str(row["question"])}])
        spelled = [[*tokenizer.encode(text), tokenizer.end] for text in texts]
        found = torch.tensor(continuation_likelihoods(model, [Choice(prompt, spelled)])[0])
        right["accuracy"] += int(found.argmax()) == answer
        right["accuracy_per_byte"] += int((found / torch.tensor([len(text) for text in texts])).argmax()) == answer
    assert scores == {f"exam.{name}": count / 4 for name, count in right.items()}


def test_choices_may_be_fields_and_numbers_start_at_first(score: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"q": "What?", "A": "blood", "B": "bone", "right": number} for number in (1, 2)]
    task = {"name": "exam", "task": "multiple_choice", "files": lines(tmp_path / "rows.jsonl", rows), "prompt": "{q}"}
    task |= {"choices": ["{A}", "It is {B}"], "answer": "right", "first": 1}
    scores, _ = score(task)
    assert scores["exam.accuracy"] == 0.5  # the same question twice, with either answer
    with pytest.raises(InputError, match=r"rows\.jsonl:2: field 'right': expected .* a number from 0 to 1, got 2"):
        score(task | {"name": "again", "first": 0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two choices, got 1"),
        ({"question": "q", "choices": "ab", "answer": 0}, "expected a list of texts in 'choices'"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "got 'c'"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "got True"),
        ({"question": "q", "choices": ["a", "b"]}, "expected the field 'answer'"),
    ],
)
def test_a_row_without_a_right_answer_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChoiceTemplate("{question}", "choices", "answer").read(row)


def glue(name: str, path: Path, *, prompt: str) -> dict[str, Any]:
    return {"name": name, "task": "classification", "files": str(path), "prompt": prompt, "response": "{label}"}


def test_glue_files_are_read_unchanged_and_labels_become_words(score: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text(
        'index\tsentence1\tsentence2\tlabel\n0\tThe "heart pumps.\tIt pumps.\t1\n1\tBlood.\tBone\'s "hard\t0\n2\tA\tA\t1\n'
    )
    task = glue("mrpc", tmp_path / "dev.tsv", prompt="{sentence1}\n{sentence2}\nDo {{both}} say the same?")
    scores, facts = score(task | {"words": {"0": "no", "1": "yes"}})
    assert set(scores) == {"mrpc.accuracy", "mrpc.macro_f1", "mrpc.ece"}
    assert facts["rows"] == 3 and facts["labels"] == ["no", "yes"]
    with pytest.raises(InputError, match=r"dev\.tsv:2: expected one of the labels in words, '0', got '1'"):
        score(task | {"name": "other", "words": {"0": "no"}})


def test_a_missing_column_of_a_tsv_file_is_reported(score: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("question\tsentence\tlabel\na\tb\t1\n")
    with pytest.raises(InputError, match=r"dev\.tsv: expected one column 'sentence1', got only 'question', 'sentence'"):
        score(glue("qnli", tmp_path / "dev.tsv", prompt="{sentence1}\n{sentence2}"))


# lm-eval

TASK = """
task: organs
dataset_path: json
dataset_kwargs: { data_files: { test: organs.jsonl } }
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{ metric: acc }, { metric: acc_norm }]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "organs.yaml").write_text(TASK)
    rows = [{"question": f"What {number}?", "choices": ["heart", "liver"], "answer": number % 2} for number in range(6)]
    lines(folder / "organs.jsonl", rows)
    return folder


def lm_eval(tasks: Path, **fields: Any) -> dict[str, Any]:
    return {"name": "o", "task": "lm_eval", "benchmark": "organs", "include_path": str(tasks), **fields}


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_lm_eval_scores_a_local_task_on_the_folder(score: Callable[..., Any], tasks: Path) -> None:
    scores, facts = score(lm_eval(tasks), gates=[{"score": "o.acc", "at_least": 0.0}])
    assert set(scores) == {"o.acc", "o.acc_norm"}
    assert 0 <= scores["o.acc"] <= 1
    assert facts["rows"] == 6
    low, high = facts["intervals"]["o.acc"]  # of six questions
    assert low <= scores["o.acc"] <= high and 0 < high - low < 1
    assert set(facts["intervals"]) == {"o.acc", "o.acc_norm"}
    escape = "{{ ''.__class__.__mro__ }}"
    (tasks / "organs.yaml").write_text(TASK.replace("{{question}}", escape))
    with pytest.raises(Exception, match="__class__"):  # jinja's SecurityError, through lm-eval
        score(lm_eval(tasks, name="again"))


ROLLING = """
task: organs
dataset_path: json
dataset_kwargs: { data_files: { test: organs.jsonl } }
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{ metric: bits_per_byte }]
"""


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_lm_eval_computes_in_the_precision_of_the_evaluation_whatever_the_weights_are_stored_in(
    checkpoint: Path, tasks: Path, tmp_path: Path, make_context: Callable[..., Context]
) -> None:
    (tasks / "organs.yaml").write_text(ROLLING)
    stored = {dtype: tmp_path / dtype for dtype in ("bfloat16", "float32")}
    for dtype, folder in stored.items():
        model = load_checkpoint(checkpoint, dtype=torch.bfloat16).to(getattr(torch, dtype))
        save_checkpoint(folder, model, checkpoint)
    stage = Evaluate.model_validate({"model": "base", "tasks": [lm_eval(tasks)]})
    found = {}
    for dtype, precision in (("bfloat16", "fp32"), ("float32", "fp32"), ("float32", "bf16")):
        parallel = Parallel.model_validate({"precision": precision})
        context = make_context(dtype + precision, inputs={"base": stored[dtype]}, parallel=parallel)
        found[dtype, precision] = stage.run(context)["scores"]["o.bits_per_byte"]
    assert found["bfloat16", "fp32"] == found["float32", "fp32"] != found["float32", "bf16"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("process_docs: !function evil.run", "expected YAML without tags such as !function"),
        ("other: !!python/object/apply:os.system [id]", "expected YAML without tags"),
        ("process_docs: evil.run", "process_docs: expected a key that holds data"),
        ("unsafe_code: true", "unsafe_code: expected a key that holds data"),
        ("include: other.yaml", "include: expected a key that holds data"),
        ("dataset_path: owner/name", "dataset_path: expected 'json', 'csv'"),
        ("dataset_kwargs: { data_files: ../secret.jsonl }", r"in the folder of the task file, got '\.\./secret\.jsonl'"),
        ("dataset_kwargs: { data_files: 'https://x/y.jsonl' }", "in the folder of the task file"),
        ("dataset_kwargs: { data_files: link.jsonl }", "got 'link.jsonl'"),
        (
            "dataset_kwargs: { data_files: organs.jsonl, trust_remote_code: true }",
            "dataset_kwargs.trust_remote_code: expected a key that holds data",
        ),
        ("doc_to_text: [1]", "doc_to_text: expected a valid string"),
    ],
)
def test_a_task_file_holds_only_data(change: str, message: str, tasks: Path) -> None:
    (tasks.parent / "secret.jsonl").write_text("{}")
    (tasks / "link.jsonl").symlink_to(tasks.parent / "secret.jsonl")
    field = change.partition(":")[0]
    kept = [line for line in TASK.strip().splitlines() if not line.startswith(f"{field}:")]
    (tasks / "organs.yaml").write_text("\n".join([*kept, change]))
    with pytest.raises(InputError, match=message):
        local_task(tasks, "organs")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("metrics", ["[{ metric: owner/evil }]", "[{ metric: acc, hf_evaluate: true }]"])
def test_a_metric_that_is_downloaded_as_code_is_refused(metrics: str, tasks: Path, score: Callable[..., Any]) -> None:
    (tasks / "organs.yaml").write_text(TASK[: TASK.index("metric_list")] + f"metric_list: {metrics}\n")
    with pytest.raises(
        InputError,
        match=r"(lm_eval:organs: metric: expected one of lm-eval's own|metric_list\.0\.\w+: )",
    ):
        score(lm_eval(tasks))


def test_the_files_of_a_task_folder_are_identity(tasks: Path) -> None:
    stage = Evaluate.model_validate({"model": "base", "tasks": [lm_eval(tasks)]})
    (found,) = [file for _, file in input_files(stage) if isinstance(file, InputFolder)]
    assert [path.name for path in found.matches()] == ["organs.jsonl", "organs.yaml"]
    assert isinstance(found, InputFile)


def test_a_text_names_a_benchmark_and_gates_may_name_its_scores() -> None:
    gates = [{"score": "arc_easy.acc", "at_least": 0.3}]
    stage = Evaluate.model_validate({"model": "base", "tasks": ["lm_eval:arc_easy"], "gates": gates})
    assert stage.tasks[0].name == "arc_easy"
    again = Evaluate.model_validate({"model": "base", **stage.model_dump(include={"tasks"})})
    assert again.tasks == stage.tasks
    for wrong in ("arc_easy", "lm_eval:", "helm:arc"):
        with pytest.raises(ValidationError, match="lm_eval:arc_easy"):
            Evaluate.model_validate({"model": "base", "tasks": [wrong]})

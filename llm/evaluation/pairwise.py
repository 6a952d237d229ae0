"""Compares two models pair by pair on their answers to the same questions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.evaluation.bootstrap import Resamples, resample, round_all, rounded
from llm.evaluation.chrf_bleu import ChrfBleu
from llm.evaluation.scoring import Answers, Outcome, Question, answer_questions, repetition
from llm.inference.batches import OnProgress
from llm.inference.processes import ALONE, Processes
from llm.models.interface import LanguageModel
from llm.tokenizer.tokenizer import TextTokenizer

Measure = npt.NDArray[np.float64]  # (N,) one number per question

# Means over the pairs; a change is the model's own value minus the other's.
SCORES = ("win_rate", "likelihood_win_rate", "chrf_change", "bits_per_byte_change", "length_change", "repetition_change")


def compare_models(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    load_other: Callable[[], tuple[LanguageModel, TextTokenizer]],
    *,
    questions: Sequence[Question],
    max_new_tokens: int,
    progress: OnProgress,
    processes: Processes = ALONE,
) -> Outcome:
    """Win rates of the model against the other, and mean changes; a tie is half a win.

    `win_rate` is the share of questions on which the model's greedy answer has the higher chrF, `likelihood_win_rate` the
    share on which it gives the expected answer the higher likelihood. The changes are of chrF, of the bits per byte of the
    expected answer, of the answer's length in characters, and of its `repetition`. The other model is in memory only while it
    answers.
    """

    def half(done: int) -> OnProgress:
        return lambda part, of: progress(done * of + part, 2 * of)

    asked: dict[str, Any] = {"questions": questions, "max_new_tokens": max_new_tokens, "processes": processes}
    other = answer_questions(*load_other(), progress=half(0), **asked)
    own = answer_questions(model, tokenizer, progress=half(1), **asked)
    of_other, of_own = (_measures(answers, tokenizer) for answers in (other, own))  # both with the model's own tokenizer
    changes = {name: values - of_other[name] for name, values in of_own.items()}
    values = {
        "win_rate": _wins(changes["chrf"]),
        "likelihood_win_rate": _wins(-changes["bits_per_byte"]),
        **{f"{name}_change": change for name, change in changes.items()},
    }
    table = np.array([values[name] for name in SCORES])  # (S, N)

    def score(draws: Resamples) -> dict[str, float]:
        return dict(zip(SCORES, (table @ draws / draws.sum()).tolist(), strict=True))

    examples = [
        {
            "row": row + 1,
            "prompt": own.prompts[row],
            "wanted": own.expected[row],
            "other": _example(other, of_other, row),
            "found": _example(own, of_own, row),
        }
        for row in range(len(questions))
    ]
    rows = len(questions)
    facts = {"facts": own.facts, "other_facts": other.facts}
    kept = {name: round_all(numbers) for name, numbers in values.items()}
    return Outcome(rounded(score(np.ones(rows))), rows, examples, facts, kept, resample(rows, score))


def _example(answers: Answers, measures: dict[str, Measure], row: int) -> dict[str, Any]:
    return {"text": answers.generated[row], **{name: round_all([numbers[row]])[0] for name, numbers in measures.items()}}


def _measures(answers: Answers, tokenizer: TextTokenizer) -> dict[str, Measure]:
    """Of each answer: chrF, bits per byte of the expected one, characters, and repetition."""
    likelihoods = answers.likelihoods
    bits = np.array(likelihoods.nats) / np.log(2) / np.array(likelihoods.text_bytes)
    return {
        "chrf": np.array(ChrfBleu(answers.generated, answers.expected).sentence_chrf),
        "bits_per_byte": np.array(round_all(bits)),  # rounded, so that numerical noise is a tie
        "length": np.array([len(text) for text in answers.generated], dtype=np.float64),
        "repetition": np.array([repetition(tokenizer.encode(text)) for text in answers.generated]),
    }


def _wins(change: Measure) -> Measure:
    return np.where(change == 0, 0.5, change > 0)

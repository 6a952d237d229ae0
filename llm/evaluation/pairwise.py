"""Two models answer the same questions, and their answers are compared pair by pair. Which is the better one is for readers
and gates to say; how the pairs are shown is not known here.
"""

from collections.abc import Callable, Sequence

import numpy as np

from llm.evaluation.bootstrap import Resamples, resample, round_all, rounded
from llm.evaluation.chrf_bleu import Likeness
from llm.evaluation.scoring import Answered, Outcome, Question, answer
from llm.inference.likelihood import OnProgress
from llm.models.interface import LanguageModel
from llm.tokenizer.tokenizer import TextTokenizer

GRAM = 4  # tokens; seq-rep-4 of Welleck et al. (2020)

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
) -> Outcome:
    """`win_rate`, the share of questions to which the model's greedy answer is nearer to the wanted one by chrF than the
    other's, and `likelihood_win_rate`, that of wanted answers that it finds likelier, where a tie is half a win; and by how
    much it changes chrF, the bits per byte of the wanted answer, the length of the answer in characters, and the share of
    it that repeats itself. The other model is in memory only while it answers.
    """

    def half(done: int) -> OnProgress:
        return lambda part, of: progress(done * of + part, 2 * of)

    other = answer(*load_other(), questions=questions, max_new_tokens=max_new_tokens, progress=half(0))
    own = answer(model, tokenizer, questions=questions, max_new_tokens=max_new_tokens, progress=half(1))
    # Both with the model's own tokens: one yardstick.
    measures = [_measures(one, tokenizer) for one in (other, own)]
    changes = {name: own_values - measures[0][name] for name, own_values in measures[1].items()}
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
            "wanted": own.wanted[row],
            **{
                name: {"text": one.found[row], **{what: round_all([of_one[what][row]])[0] for what in of_one}}
                for name, one, of_one in (("other", other, measures[0]), ("found", own, measures[1]))
            },
        }
        for row in range(len(questions))
    ]
    facts = {"facts": own.facts, "other_facts": other.facts}
    return Outcome(
        rounded(score(np.ones(len(questions)))),
        len(questions),
        examples,
        facts,
        values={name: round_all(of_one) for name, of_one in values.items()},
        replicates=resample(len(questions), score),
    )


def _measures(answered: Answered, tokenizer: TextTokenizer) -> dict[str, Resamples]:
    """Of every answer: chrF, bits per byte of the wanted one, characters, and the share that repeats itself."""
    likelihoods = answered.likelihoods
    bits = np.array(likelihoods.nats) / np.log(2) / np.array(likelihoods.text_bytes)
    return {
        "chrf": np.array(Likeness(answered.found, answered.wanted).sentence_chrf),
        "bits_per_byte": np.array(round_all(bits)),  # so that what only rounding makes differ is a tie
        "length": np.array([len(text) for text in answered.found], dtype=np.float64),
        "repetition": np.array([repetition(tokenizer.encode(text)) for text in answered.found]),
    }


def repetition(tokens: Sequence[int]) -> float:
    """The share of the runs of four tokens that occurred before."""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _wins(change: Resamples) -> Resamples:
    return np.where(change == 0, 0.5, change > 0)

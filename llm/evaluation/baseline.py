"""What a classification without a language model reaches: TF-IDF of words and characters, and logistic regression.

A model that is not better has learned nothing that is worth its size (Wang and Manning 2012, "Baselines and Bigrams").
"""

from collections.abc import Sequence

import numpy as np

from llm.data.turn import Turn
from llm.errors import InputError
from llm.evaluation.classification import judged_labels, label_names
from llm.evaluation.scoring import Outcome, Question

MOST_FEATURES = 200_000  # of words, and of runs of characters
NEVER = -1e3  # log P of a label that was never learned
C = 10.0  # inverse of the strength of regularization: texts are short, and weights of TF-IDF small


def classify_without_model(
    train: Sequence[Sequence[Turn]], questions: Sequence[Question], *, labels: Sequence[str] | None = None
) -> Outcome:
    """Learn from chats whose last turn is the label, and score `questions` as `llm.evaluation.classification.classify` does."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    names = label_names(questions, labels)
    known = [turns[-1].content for turns in train]
    if len(set(known)) < 2:
        raise InputError(f"expected rows of at least two labels to learn from, got {len(set(known))} in {len(known):,} rows")
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", sublinear_tf=True, max_features=MOST_FEATURES),
        # Inside words, and across them where a language writes no spaces.
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, max_features=MOST_FEATURES),
    )
    classifier = make_pipeline(features, LogisticRegression(C=C, max_iter=1000))
    classifier.fit([_prompt(turns) for turns in train], known)
    prompts = [_prompt(question.turns) for question in questions]
    logarithms = classifier.predict_log_proba(prompts)  # (N, labels that were learned)
    likelihoods = np.full((len(questions), len(names)), NEVER)
    for column, name in enumerate(classifier.classes_):
        if name in names:
            likelihoods[:, names.index(name)] = np.maximum(logarithms[:, column], NEVER)
    return judged_labels(names, questions, likelihoods, prompts=prompts, facts={"learned_rows": len(train)})


def _prompt(turns: Sequence[Turn]) -> str:
    return "\n".join(turn.content for turn in turns[:-1])

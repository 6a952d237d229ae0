"""What a classification without a language model reaches: TF-IDF of words and characters, and logistic regression.

A model that is not better has learned nothing that is worth its size (Wang and Manning 2012, "Baselines and Bigrams").
"""

from collections.abc import Sequence

import numpy as np

from llm.data.turn import Turn
from llm.errors import InputError
from llm.evaluation.classification import judged_labels, label_names
from llm.evaluation.multi_label import judged_label_sets
from llm.evaluation.scoring import Outcome, Question

MOST_FEATURES = 200_000  # of words, and of runs of characters
NEVER = -1e3  # log P of a label that was never learned
C = 10.0  # inverse of the strength of regularization: texts are short, and weights of TF-IDF small


def classify_without_model(
    train: Sequence[tuple[Sequence[Turn], tuple[str, ...]]],
    questions: Sequence[Question],
    *,
    labels: Sequence[str] | None = None,
    several: bool = False,
    threshold: float | None = None,
) -> Outcome:
    """Learn from chats and their labels (one each, unless there are `several`), and score `questions` as
    `llm.evaluation.classification.classify` does."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.preprocessing import MultiLabelBinarizer

    names = label_names(questions, labels)
    known = sorted({label for _, of_row in train for label in of_row})
    if len(known) < 2:
        raise InputError(f"expected rows of at least two labels to learn from, got {len(known)} in {len(train):,} rows")
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", sublinear_tf=True, max_features=MOST_FEATURES),
        # Inside words, and across them where a language writes no spaces.
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, max_features=MOST_FEATURES),
    )
    model = LogisticRegression(C=C, max_iter=1000)
    classifier = make_pipeline(features, OneVsRestClassifier(model) if several else model)
    targets = MultiLabelBinarizer(classes=known).fit_transform([of_row for _, of_row in train])
    classifier.fit([_prompt(turns) for turns, _ in train], targets if several else [of_row[0] for _, of_row in train])
    prompts = [_prompt(question.turns) for question in questions]
    with np.errstate(divide="ignore"):
        logarithms = np.log(classifier.predict_proba(prompts))  # (N, labels that were learned)
    likelihoods = np.full((len(questions), len(names)), NEVER)
    for column, name in enumerate(known):
        if name in names:
            likelihoods[:, names.index(name)] = np.maximum(logarithms[:, column], NEVER)
    facts = {"learned_rows": len(train)}
    if several:
        shares = np.exp(likelihoods)
        return judged_label_sets(names, questions, shares, prompts=prompts, facts=facts, threshold=threshold)
    return judged_labels(names, questions, likelihoods, prompts=prompts, facts=facts)


def _prompt(turns: Sequence[Turn]) -> str:
    return "\n".join(turn.content for turn in turns[:-1])

"""chrF and BLEU between two sets of texts: of the whole set, of resamples, and of each pair."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm.evaluation.bootstrap import Resamples, rounded
from llm.text.documents import language_by_script

BLEU_TOKENIZERS = {"zh": "zh", "ja": "char", "thai": "char"}  # languages that write no spaces; "13a" for all others


class ChrfBleu:
    """`chrf` (Popović 2015) and `bleu` (Papineni et al. 2002) of generated texts against expected ones, by sacrebleu (Post
    2018).

    Both are functions of counts that are summed over the texts.
    """

    def __init__(self, generated: Sequence[str], expected: Sequence[str]) -> None:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        ((language, _),) = Counter(map(language_by_script, expected)).most_common(1)
        tokenizer = BLEU_TOKENIZERS.get(language, "13a")
        self._metrics: dict[str, Any] = {"chrf": CHRF(), "bleu": BLEU(tokenize=tokenizer, force=True)}  # force: no warning
        self._counts = {  # (N, ...): sacrebleu's own bootstrap sums them too
            name: np.array(metric._extract_corpus_statistics(generated, [expected]), dtype=np.float64)
            for name, metric in self._metrics.items()
        }

    def score(self, draws: Resamples) -> dict[str, float]:
        """Both, 0 to 100; each pair of texts counts as often as it was drawn."""
        return {name: self._score(name, draws @ counts) for name, counts in self._counts.items()}

    @property
    def scores(self) -> dict[str, float]:
        """Both of the whole set."""
        return rounded({name: self._score(name, counts.sum(0)) for name, counts in self._counts.items()})

    @property
    def sentence_chrf(self) -> list[float]:
        """The chrF of each pair."""
        return [self._score("chrf", counts) for counts in self._counts["chrf"]]

    def _score(self, name: str, counts: Any) -> float:
        return float(self._metrics[name]._compute_score_from_stats([int(count) for count in counts]).score)

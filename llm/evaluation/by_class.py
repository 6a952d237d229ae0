"""Precision, recall and F1 of each label, from counts of rows.

Letters: L labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def by_class(
    names: Sequence[str], right: npt.NDArray[Any], expected: npt.NDArray[Any], chosen: npt.NDArray[Any]
) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each label, from how often (L,) it was rightly chosen, expected, and chosen.

    What has no row to divide by is 0, as in scikit-learn.
    """
    precision, recall = right / np.maximum(1, chosen), right / np.maximum(1, expected)
    f1 = 2 * right / np.maximum(1, expected + chosen)
    columns = ([float(f"{value:.4g}") for value in column] for column in (precision, recall, f1))
    return [
        {"label": name, "precision": p, "recall": r, "f1": f, "support": int(support)}
        for name, p, r, f, support in zip(names, *columns, expected, strict=True)
    ]

"""Words that become tokens of a model from elsewhere, such as terms of a domain that its tokenizer cuts into many pieces.

The row of a new token, in the embedding and in a head of its own, starts as the mean of the rows of the pieces that spelled it
(Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html, has why a random row would take over every softmax). It
takes a padded row of the embedding where its number has one, else a new row.

Letters: V rows, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.errors import InputError
from llm.tokenizer.tokenizer import TextTokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_words(tokenizer: TextTokenizer, words: Sequence[str]) -> tuple[TextTokenizer, dict[int, list[int]]]:
    """The tokenizer with each of `words` as a token, and the pieces of each new token by its id.

    InputError for a word that is one token already, or that would not come back when it is decoded, and for a tokenizer that
    begins a new word behind each added token, as those of Llama 2 do.
    """
    if twice := sorted({word for word in words if words.count(word) > 1}):
        raise InputError(f"add_tokens: expected each word once, got {twice[0]!r} twice")
    pieces = tokenizer.encode_batch(words)
    for word, ids in zip(words, pieces, strict=True):
        if len(ids) < 2:
            raise InputError(f"add_tokens: expected words of several tokens, got {word!r}, which is {len(ids)}")
    extended = tokenizer.with_words(words)
    spelled: dict[int, list[int]] = {}
    for word, ids in zip(words, pieces, strict=True):
        found = extended.encode(word)
        if len(found) != 1 or extended.decode(found) != word:
            raise InputError(
                f"add_tokens: expected words that the tokenizer reads and writes as one token, got {word!r}, which becomes "
                f"{extended.decode(found)!r} in {len(found)}"
            )
        inside = f"a{word}b"
        if tokenizer.decode(tokenizer.encode(inside)) == inside != extended.decode(extended.encode(inside)):
            raise InputError(
                f"add_tokens: expected a tokenizer that reads text behind an added token as it is, got one that puts a space "
                f"there: {inside!r} becomes {extended.decode(extended.encode(inside))!r}"
            )
        spelled[found[0]] = ids
    return extended, spelled


def with_rows(weights: dict[str, Tensor], spelled: dict[int, list[int]]) -> dict[str, Tensor]:
    """The weights with a row for each token of `spelled`, from the rows of its pieces."""
    changed = {name: _with_rows(weights[name], spelled) for name in (EMBEDDING, HEAD) if name in weights}
    return weights | changed


def _with_rows(matrix: Tensor, spelled: dict[int, list[int]]) -> Tensor:
    rows, width = matrix.shape
    extended = matrix.new_empty(max(rows, 1 + max(spelled, default=0)), width)  # (V, D)
    extended[:rows] = matrix
    for token, pieces in spelled.items():
        extended[token] = matrix[pieces].float().mean(0).to(matrix.dtype)
    for token in range(rows, len(extended)):
        if token not in spelled:  # a number that no token has
            extended[token] = torch.zeros_like(extended[token])
    return extended

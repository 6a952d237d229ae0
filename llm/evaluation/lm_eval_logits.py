"""Logits for lm-eval only where it looks at them: it asks for those of a whole batch, and then reads the continuations' alone.

Letters: B rows, T positions, N positions of a continuation, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from llm.layers.log_probabilities import LOGITS

Head = Callable[[Tensor], Tensor]  # hidden states (N, D) to logits (N, V)


def with_late_logits(wrapper: type[Any]) -> type[Any]:
    """lm-eval's class of models, whose logits are made where they are read. Its own way would hold (B, T, V), twice in
    fp32."""

    class LateLogits(wrapper):  # type: ignore[misc]  # known only where lm-eval is installed
        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
            with torch.no_grad():
                hidden = self.model.base_model(inps).last_hidden_state
            return BatchOfLogits(hidden, lambda part: _logits(self.model, part))

    return LateLogits


@torch.no_grad()
def _logits(model: Any, hidden: Tensor) -> Tensor:
    """The model's logits (N, V) of hidden states (N, D), with all that it does to them, such as a cap."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    base = model.base_model
    base.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden[None])
    try:
        logits: Tensor = model(torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device), use_cache=False).logits[0]
    finally:
        del base.forward  # the one of its class again
    return logits


class BatchOfLogits:
    """The log-probabilities of a batch, (B, T, V), which are not made yet."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self._hidden, self._head = hidden, head

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What lm-eval does with them: log_softmax of a batch, and gather of a continuation."""
        if function is log_softmax:
            return args[0]
        assert function is torch.gather
        return args[0].gather(args[2])

    def __iter__(self) -> Iterator["RowOfLogits"]:
        return (RowOfLogits(row, self._head) for row in self._hidden)


class RowOfLogits:
    """The log-probabilities of a row, (T, V)."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self._hidden, self._head = hidden, head
        self.shape = hidden.shape[:1]

    def __getitem__(self, part: slice) -> "ContinuationLogits":
        return ContinuationLogits(self._hidden[part], self._head)


class ContinuationLogits(BatchOfLogits):
    """The log-probabilities of a continuation, (1, N, V), of which LOGITS numbers at a time are made, and twice."""

    def unsqueeze(self, dim: int) -> "ContinuationLogits":
        """The same."""
        return self

    def expand(self, count: int, *_: int) -> "ContinuationLogits":
        """The same for each of several continuations, which `chunk` takes apart."""
        return self

    def chunk(self, count: int) -> list["ContinuationLogits"]:
        """The same for each of several continuations."""
        return [self] * count

    def argmax(self, dim: int) -> Tensor:
        """The most probable tokens, (1, N)."""
        return torch.cat([logits.argmax(-1) for _, logits in self._pieces()])[None]

    def gather(self, tokens: Tensor) -> Tensor:
        """The log-probabilities of tokens (1, N, 1), of the same shape."""
        found = [
            log_softmax(logits, -1, dtype=torch.float32).gather(-1, tokens[0, start : start + len(logits)])
            for start, logits in self._pieces()
        ]
        return torch.cat(found)[None]

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Logits (n, V), and the first of their positions."""
        start = 0
        rows = 1  # of the first piece, which tells the size of the vocabulary
        while start < len(self._hidden):
            logits = self._head(self._hidden[start : start + rows])
            yield start, logits
            start += len(logits)
            rows = max(1, LOGITS // logits.shape[-1])

"""Predictions for rows whose answers nobody knows: scores of labels, answers to prompts, likelihoods of texts."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm.data.truncation import Long
from llm.data.turn import Turn
from llm.errors import InputError
from llm.evaluation.calibration import Floats
from llm.evaluation.classification import label_likelihoods
from llm.evaluation.scoring import Question, prompt_tokens, score_texts
from llm.inference.batches import OnProgress
from llm.inference.generate import generate
from llm.inference.sampling import Sampling
from llm.models.interface import Decoding, LanguageModel
from llm.tokenizer.tokenizer import TextTokenizer


def _quiet(done: int, total: int) -> None:
    """Progress that nobody follows."""


@dataclass(frozen=True)
class Predictor:
    """A model that predicts for batches of rows; `decoding` is its decoding form. Prompts are turns up to the user's."""

    model: LanguageModel
    tokenizer: TextTokenizer
    decoding: Decoding

    def label_scores(
        self,
        prompts: Sequence[Sequence[Turn]],
        labels: Sequence[str],
        *,
        long: Long = "cut",
        progress: OnProgress = _quiet,
    ) -> Floats:
        """log P of each label after each prompt, (N, L), as `classification` scores it."""
        questions = _questions(prompts)
        return label_likelihoods(self.decoding, self.tokenizer, questions, labels, long=long, progress=progress)[0]

    def answers(self, prompts: Sequence[Sequence[Turn]], *, max_new_tokens: int) -> list[tuple[str, bool]]:
        """The greedy answer to each prompt, and whether it was cut at `max_new_tokens`."""
        room = self.model.context - max_new_tokens
        read = [prompt_tokens(question, self.tokenizer, room) for question in _questions(prompts)]
        written = generate(self.decoding, read, max_new_tokens=max_new_tokens, end=self.tokenizer.ends, sampling=Sampling())
        return [(self.tokenizer.decode(ids), len(ids) == max_new_tokens) for ids in written]

    def text_likelihoods(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """log P of each text with its end token, in nats, and its number of tokens."""
        found = score_texts(self.model, self.tokenizer, texts=texts, progress=_quiet).values
        return [(-nats, tokens) for nats, tokens in zip(found["nats"], found["tokens"], strict=True)]


def _questions(prompts: Sequence[Sequence[Turn]]) -> list[Question]:
    for prompt in prompts:
        if not prompt or prompt[-1].role == "assistant":
            raise InputError("expected a prompt that ends with a turn of the user, got another")
    return [Question("row", [*prompt, Turn("assistant", ("",))]) for prompt in prompts]

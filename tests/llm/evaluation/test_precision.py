"""Scores in bf16 are those in fp32, within their confidence intervals: a model that has learned is rounded, not changed."""

import random
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from llm.data.batch import IGNORE
from llm.data.turn import Turn
from llm.evaluation.classification import classify
from llm.evaluation.scoring import Outcome, Question, score_answers, score_texts
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.models.interface import LanguageModel, dtype_of
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe
from runner.gates import DEFAULT_CONFIDENCE, interval

WORDS = {
    "organ": ["heart", "liver", "lung", "kidney"],
    "symptom": ["fever", "cough", "rash", "pain"],
    "food": ["rice", "milk"],
}


def questions(count: int, *, seed: int) -> list[Question]:
    """Questions of two words, the first of which decides; one in eight has another answer."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        label = draw.choice(list(WORDS))
        text = f"{draw.choice(WORDS[label])} and {draw.choice(draw.choice(list(WORDS.values())))}"
        answer = label if draw.random() < 7 / 8 else draw.choice(list(WORDS))
        found.append(Question(f"rows:{number}", [Turn("user", ("", text, "")), Turn("assistant", (answer,))]))
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned to answer."""
    folder = tmp_path_factory.mktemp("trained")
    texts = [" ".join(turn.content for turn in question.turns) for question in questions(60, seed=1)]
    tokenizer = train_bpe(texts, 300, min_frequency=2, pre_tokenizer_name="gpt-2", allow_smaller=True)
    tokenizer.save(folder)
    torch.manual_seed(3)
    model = Decoder(DecoderConfig(hidden_size=32, layers=2, heads=4, context=64), vocab_size=tokenizer.vocab_size)
    rows = [tokenizer.encode_chat([turn.message for turn in question.turns]) for question in questions(256, seed=2)]
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    learned = [mask + [False] * (width - len(mask)) for _, mask in rows]
    targets = torch.where(torch.tensor(learned), tokens, IGNORE)[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        batch = slice(32 * (step % 8), 32 * (step % 8) + 32)
        logits = model(tokens[batch])[:, :-1]
        cross_entropy(logits.flatten(0, 1), targets[batch].flatten(), ignore_index=IGNORE).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_checkpoint(folder, model, folder)
    return folder


def scored(model: LanguageModel, tokenizer: TextTokenizer) -> dict[str, Outcome]:
    rows = questions(120, seed=4)
    texts = [question.turns[0].content for question in rows[:40]]
    return {
        "section": classify(model, tokenizer, questions=rows, progress=lambda done, total: None),
        "answers": score_answers(model, tokenizer, questions=rows, max_new_tokens=6, progress=lambda done, total: None),
        "text": score_texts(model, tokenizer, texts=texts, progress=lambda done, total: None),
    }


def test_scores_in_bf16_agree_with_fp32_within_their_intervals(checkpoint: Path) -> None:
    tokenizer = TextTokenizer.load(checkpoint)
    exact, rounded = (
        scored(load_checkpoint(checkpoint, dtype=dtype_of(precision)), tokenizer) for precision in ("fp32", "bf16")
    )
    assert exact["section"].scores["macro_f1"] > 0.7  # it has learned
    assert rounded["text"].values != exact["text"].values  # and is really computed in another precision
    for task, outcome in exact.items():
        assert set(outcome.scores) == set(rounded[task].scores)
        for score, value in rounded[task].scores.items():
            low, high = interval(outcome.replicates[score], DEFAULT_CONFIDENCE)
            assert low <= value <= high, (task, score)
    # What layers add up is not rounded to bf16: texts are as likely as in fp32, to three digits.
    bits = [outcomes["text"].scores["bits_per_byte"] for outcomes in (exact, rounded)]
    assert bits[1] == pytest.approx(bits[0], rel=1e-3)


def test_the_weights_of_a_model_in_bf16_take_half_the_memory(checkpoint: Path) -> None:
    sizes = [
        sum(weight.nbytes for weight in load_checkpoint(checkpoint, dtype=dtype_of(precision)).parameters())
        for precision in ("fp32", "bf16")
    ]
    assert sizes[0] == 2 * sizes[1]

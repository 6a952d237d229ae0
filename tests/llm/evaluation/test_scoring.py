"""Evaluation: numbers that can be worked out by hand or by the plain forward pass, and rows that cannot be used."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import llm.inference.likelihood
import llm.layers.log_probabilities
from llm.data.batch import IGNORE
from llm.data.truncation import windows
from llm.data.turn import Turn
from llm.errors import InputError, Interrupted
from llm.evaluation.chrf_bleu import ChrfBleu
from llm.evaluation.classification import classify
from llm.evaluation.pairwise import compare_models
from llm.evaluation.scoring import Answers, Form, Likelihoods, Question, repetition, score_answers, score_texts
from llm.inference.generate import generate
from llm.inference.likelihood import Choice, Window, continuation_likelihoods, negative_log_likelihoods
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.tokenizer import TextTokenizer
from llm.tokenizer.train_bpe import train_bpe

CONTEXT = 48
TEXTS = ["The heart pumps blood.", "咳嗽和发热。", "Blood is red, and the heart is a muscle. " * 6]

GOLDEN = {
    "text": {"perplexity": 306.978, "bits_per_byte": 2.54215},
    "labels": {"accuracy": 0.333333, "macro_f1": 0.166667, "ece": 0.658818},
    "answers": {"perplexity": 251.57, "bits_per_byte": 3.54436},
    "comparison": {"chrf": 85.1645, "bleu": 81.8731},
}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(TEXTS * 2, 300, min_frequency=2, pre_tokenizer_name="gpt-2", allow_smaller=True)


@pytest.fixture
def model(tokenizer: TextTokenizer) -> Decoder:
    torch.manual_seed(5)
    config = DecoderConfig(hidden_size=16, layers=2, heads=4, kv_heads=2, context=CONTEXT)
    return Decoder(config, vocab_size=tokenizer.vocab_size).eval().requires_grad_(False)


@pytest.fixture
def indifferent(model: Decoder) -> Decoder:
    """A model that gives every token the same likelihood."""
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def question(prompt: str, answer: str, *, place: str = "rows.jsonl:1") -> Question:
    return Question(place, [Turn("user", ("Say: ", prompt, "")), Turn("assistant", (answer,))])


LABELS = ["blood", "heart"]


def silent(done: int, total: int) -> None:
    pass


def test_an_indifferent_model_has_the_vocabulary_as_its_perplexity_on_text(
    indifferent: Decoder, tokenizer: TextTokenizer
) -> None:
    outcome = score_texts(indifferent, tokenizer, texts=TEXTS, progress=silent)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)  # each document's end token is scored, its begin token not
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert max(len(tokenizer.encode(text)) for text in TEXTS) > CONTEXT  # a document that is cut
    assert outcome.scores["perplexity"] == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    assert outcome.scores["bits_per_byte"] == pytest.approx(tokens * math.log2(tokenizer.vocab_size) / text_bytes, rel=1e-5)
    assert outcome.rows == 3


def test_the_likelihood_of_windows_is_that_of_one_forward_pass_each(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    windows = []
    for length in (3, 17, 9, 30, 30):
        tokens = torch.randint(0, model.vocab_size, (length + 1,), generator=generator).tolist()
        windows.append(Window(tokens[:-1], [IGNORE, *tokens[2:]]))
    monkeypatch.setattr(llm.inference.likelihood, "BATCH_TOKENS", 64)  # several batches
    monkeypatch.setattr(llm.layers.log_probabilities, "LOGITS", model.vocab_size * 7)  # several pieces each
    found = negative_log_likelihoods(model, windows)
    for window, nats in zip(windows, found, strict=True):
        logits = model(torch.tensor([window.tokens]))[0, 1:].log_softmax(-1)
        wanted = -logits.gather(-1, torch.tensor(window.targets[1:])[:, None]).sum()
        assert nats == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("scores", [2**23, 400])  # all continuations in one pass, and in several
def test_continuations_of_a_shared_prompt_have_the_likelihood_of_their_own_forward_pass(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, scores: int
) -> None:
    monkeypatch.setattr(llm.inference.likelihood, "SCORES", scores)
    labels = [[7, 8, 9, 1], [7, 1], [200, 201, 1], [1]]
    choices = [
        Choice([0, 40, 41, 42, 43, 44], labels),
        Choice([0], labels),
        Choice([0, 99, 100], [[5, 6, 7, 8, 9, 1]]),
        Choice([0, 99], [[1], [9, 1]]),
        Choice([0, 7], [*labels, [12, 13, 14], [7, 8, 9, 1]]),
    ]
    found = continuation_likelihoods(model, choices)
    assert [len(of_row) for of_row in found] == [4, 4, 1, 2, 6]
    for choice, of_row in zip(choices, found, strict=True):
        for tokens, likelihood in zip(choice.continuations, of_row, strict=True):
            logits = model(torch.tensor([[*choice.prompt, *tokens]]))[0].log_softmax(-1)
            wanted = sum(logits[len(choice.prompt) - 1 + place, token] for place, token in enumerate(tokens))
            assert likelihood == pytest.approx(float(wanted), rel=1e-4)


def test_the_likeliest_label_is_chosen_and_wrong_rows_are_examples(model: Decoder, tokenizer: TextTokenizer) -> None:
    labels = ["blood", "heart", "a muscle"]
    prompts = ["咳嗽", "red and the heart", "T", "blood " * 60]
    spelled = [[*tokenizer.encode(label), tokenizer.end] for label in labels]
    likeliest = []
    for prompt in prompts[:3]:
        ids = tokenizer.encode_prompt([{"role": "user", "content": f"Say: {prompt}"}])
        (found,) = continuation_likelihoods(model, [Choice(ids, spelled)])
        likeliest.append(labels[found.index(max(found))])
    wrong = next(label for label in labels if label != likeliest[1])
    wanted = [likeliest[0], wrong, likeliest[2], "blood"]
    questions = [question(prompt, label) for prompt, label in zip(prompts, wanted, strict=True)]

    outcome = classify(model, tokenizer, questions=questions[:3], labels=labels, progress=silent)
    assert outcome.scores["accuracy"] == pytest.approx(2 / 3, rel=1e-5)
    assert [(error["row"], error["wanted"], error["found"]) for error in outcome.examples] == [(2, wrong, likeliest[1])]
    assert outcome.examples[0]["prompt"] == "Say: red and the heart"
    assert outcome.examples[0]["nats_behind"] > 0

    assert classify(model, tokenizer, questions=questions, labels=labels, progress=silent).facts["cut_prompts"] == 1


def test_a_long_document_is_classified_by_the_mean_over_its_windows(model: Decoder, tokenizer: TextTokenizer) -> None:
    text = " ".join(f"red blood and the heart {n}" for n in range(20))

    def lead(turns: list[Turn]) -> float:
        """By how many nats "blood" is likelier than "heart"."""
        one = Question("rows.jsonl:1", turns)
        behind = [
            sum(
                error["nats_behind"]
                for error in classify(model, tokenizer, questions=[wanted], labels=LABELS, progress=silent).examples
            )
            for wanted in (one.with_answer("heart"), one.with_answer("blood"))
        ]
        return behind[0] - behind[1]

    long = question(text, "heart")
    pieces = windows(long.turns, tokenizer, positions=model.context)
    wanted = sum(map(lead, pieces)) / len(pieces)
    other = question("short", "blood")
    outcome = classify(model, tokenizer, questions=[other, long, other], labels=LABELS, long="window", progress=silent)
    found = sum(error["nats_behind"] for error in outcome.examples if error["row"] == 2)
    assert len(pieces) > 3 and found == pytest.approx(max(0.0, wanted), abs=2e-3)
    assert outcome.facts["cut_prompts"] == 0 and outcome.rows == 3
    with pytest.raises(InputError, match=r'rows.jsonl:1: expected at most \d+ positions, as long = "fail" asks'):
        classify(model, tokenizer, questions=[other, long], labels=LABELS, long="fail", progress=silent)


def test_macro_f1_counts_a_label_that_was_never_found_as_zero(indifferent: Decoder, tokenizer: TextTokenizer) -> None:
    # Every token is equally likely, so the label of fewest tokens wins; "a" is one of the 256 bytes.
    questions = [question("x", "a"), question("y", "a"), question("z", "a muscle")]
    outcome = classify(indifferent, tokenizer, questions=questions, progress=silent)
    assert outcome.facts["labels"] == ["a", "a muscle"]
    # "a": precision 2/3, recall 1, F1 0.8; "a muscle": 0.
    # "a" is a token shorter, so it is as many times likelier as there are tokens.
    sure = 1 - 1 / (indifferent.lm_head.out_features + 1)
    assert outcome.scores == {
        "accuracy": pytest.approx(2 / 3, rel=1e-5),
        "macro_f1": pytest.approx(0.4),
        "ece": pytest.approx(sure - 2 / 3, abs=2e-6),
    }


def test_an_unknown_label_is_an_error_with_its_place(model: Decoder, tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:7: expected one of the labels 'blood', 'heart', got 'lung'"):
        classify(
            model,
            tokenizer,
            questions=[question("x", "lung", place="rows.jsonl:7")],
            labels=["blood", "heart"],
            progress=silent,
        )


@pytest.mark.parametrize("labels", [None, ["a", "a"]])
def test_a_choice_among_one_label_is_refused(model: Decoder, tokenizer: TextTokenizer, labels: list[str] | None) -> None:
    questions = [question("x", "a"), question("y", "a")]
    with pytest.raises(InputError, match=r"rows.jsonl:1: expected rows of at least two distinct labels .* got 'a' alone in 2"):
        classify(model, tokenizer, questions=questions, labels=labels, progress=silent)


@pytest.mark.parametrize("score", [classify, score_texts])
def test_a_progress_callback_can_stop_the_scoring(
    model: Decoder, tokenizer: TextTokenizer, score: Callable[..., object]
) -> None:
    def stop(done: int, total: int) -> None:
        raise Interrupted

    rows = {"texts": TEXTS} if score is score_texts else {"questions": [question("x", "a"), question("x", "b")]}
    with pytest.raises(Interrupted):
        score(model, tokenizer, progress=stop, **rows)


def test_an_indifferent_model_has_the_vocabulary_as_its_perplexity_on_answers(
    indifferent: Decoder, tokenizer: TextTokenizer
) -> None:
    questions = [question("heart", "It pumps."), question("咳", "发热。")]
    outcome = score_answers(indifferent, tokenizer, questions=questions, max_new_tokens=0, progress=silent)
    tokens = sum(len(tokenizer.encode(answer)) + 1 for answer in ("It pumps.", "发热。"))
    text_bytes = len("It pumps.发热。".encode())
    assert outcome.scores["perplexity"] == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    assert outcome.scores["bits_per_byte"] == pytest.approx(tokens * math.log2(tokenizer.vocab_size) / text_bytes, rel=1e-5)
    assert set(outcome.scores) == {"perplexity", "bits_per_byte"}


def test_answers_that_the_model_gives_itself_score_100(model: Decoder, tokenizer: TextTokenizer) -> None:
    prompts = ["heart", "blood", "muscle", "red", "the", "is"]
    ids = [tokenizer.encode_prompt([{"role": "user", "content": f"Say: {prompt}"}]) for prompt in prompts]
    own = [tokenizer.decode(answer) for answer in generate(model, ids, max_new_tokens=12, end=[tokenizer.end])]
    usable = [(prompt, answer) for prompt, answer in zip(prompts, own, strict=True) if answer.strip()]
    assert usable
    questions = [question(prompt, answer) for prompt, answer in usable]
    outcome = score_answers(model, tokenizer, questions=questions, max_new_tokens=12, progress=silent)
    assert outcome.scores["chrf"] == pytest.approx(100)
    assert [example["found"] for example in outcome.examples] == [answer for _, answer in usable]


def form(generated: list[str], expected: list[str], tokenizer: TextTokenizer, most: int = 100) -> Form:
    likelihoods = Likelihoods([0.0] * len(expected), [1] * len(expected), [1] * len(expected))
    return Form.of(Answers(likelihoods, expected, expected, generated, {}), tokenizer, most=most)


def test_collapsed_answers_are_warned_of(tokenizer: TextTokenizer) -> None:
    expected = ["the heart pumps blood", "blood is red", "the muscle is red", "the heart is red"]

    def told(generated: list[str], most: int = 100) -> str:
        return "; ".join(form(generated, expected, tokenizer, most).warnings(generated))

    assert told(expected) == ""
    assert "4 of 4 answers are the same: 'heart'" in told(["heart"] * 4)
    assert "of the length of the expected ones" in told(["a", "b", "c", "d"])
    assert "length" not in told([text[:3] for text in expected], most=3), "as long as an answer may be"
    looping = [f"{number} the the the the the the the the the the the the" for number in range(4)]
    assert "answers repeat" in told(looping) and "more than expected" in told(looping)
    found = form(expected, expected, tokenizer).score(np.ones(4))
    assert found == {
        "length_ratio": 1.0,
        "repetition": pytest.approx(float(np.mean([repetition(tokenizer.encode(t)) for t in expected]))),
    }


def test_a_long_prompt_leaves_room_for_its_answer(model: Decoder, tokenizer: TextTokenizer) -> None:
    outcome = score_answers(
        model, tokenizer, questions=[question("the heart " * 40, "blood")], max_new_tokens=16, progress=silent
    )
    assert outcome.facts["cut_prompts"] == 1
    assert outcome.facts["new_tokens"] in range(1, 17)


def test_an_answer_longer_than_the_context_is_scored_as_far_as_it_fits(indifferent: Decoder, tokenizer: TextTokenizer) -> None:
    outcome = score_answers(
        indifferent, tokenizer, questions=[question("咳", "heart " * 80)], max_new_tokens=0, progress=silent
    )
    assert outcome.facts["cut_answers"] == 1
    assert outcome.scores["perplexity"] == pytest.approx(tokenizer.vocab_size, rel=1e-5)


def test_a_prompt_is_shown_whole_even_if_a_long_answer_leaves_no_room_for_it(model: Decoder, tokenizer: TextTokenizer) -> None:
    questions = [question("咳", "heart " * 80)]
    outcome = score_answers(model, tokenizer, questions=questions, max_new_tokens=4, progress=silent)
    assert [example["prompt"] for example in outcome.examples] == ["Say: 咳"]


def test_more_new_tokens_than_the_context_are_refused(model: Decoder, tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="max_new_tokens: expected less than the model's context"):
        score_answers(model, tokenizer, questions=[question("x", "y")], max_new_tokens=CONTEXT, progress=silent)


def test_a_model_with_likelihoods_that_are_not_numbers_is_refused(model: Decoder, tokenizer: TextTokenizer) -> None:
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(InputError, match="not finite"):
        score_texts(model, tokenizer, texts=TEXTS, progress=silent)


def test_chinese_is_compared_character_by_character() -> None:
    # Without spaces the whole sentence is one word for "13a", and one wrong character would make BLEU zero.
    scores = ChrfBleu(["患者需要多喝水，注意休息。"], ["患者需要多饮水，注意休息。"]).scores
    assert 50 < scores["bleu"] < 100
    assert ChrfBleu(["the heart pumps blood well"], ["the heart pumps blood well"]).scores == {"chrf": 100, "bleu": 100}


def test_scores_of_a_fixed_model_do_not_change(model: Decoder, tokenizer: TextTokenizer) -> None:
    # Weights by a formula, not a generator: these numbers change only if the meaning of a score does.
    with torch.no_grad():
        for number, weight in enumerate(model.parameters(), start=1):
            weight.copy_(torch.cos(torch.arange(weight.numel(), dtype=torch.float64) * number).reshape(weight.shape) / 2)
    labels = ["blood", "heart", "a muscle"]
    questions = [question(text, labels[number % 3]) for number, text in enumerate([*TEXTS, "red", "the", "is"])]
    found = {
        "text": score_texts(model, tokenizer, texts=TEXTS, progress=silent).scores,
        "labels": classify(model, tokenizer, questions=questions, progress=silent).scores,
        "answers": score_answers(model, tokenizer, questions=questions, max_new_tokens=0, progress=silent).scores,
        "comparison": ChrfBleu(["the heart pumps red blood"], ["the heart pumps red blood well"]).scores,
    }
    assert found == {task: pytest.approx(scores, rel=1e-4) for task, scores in GOLDEN.items()}


def test_a_model_compared_with_itself_wins_half_and_changes_nothing(model: Decoder, tokenizer: TextTokenizer) -> None:
    seen: list[tuple[int, int]] = []
    outcome = compare_models(
        model,
        tokenizer,
        lambda: (model, tokenizer),
        questions=[question("x", "blood"), question("red", "a muscle")],
        max_new_tokens=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert outcome.scores.pop("win_rate") == outcome.scores.pop("likelihood_win_rate") == 0.5
    assert outcome.scores == dict.fromkeys(("chrf_change", "bits_per_byte_change", "length_change", "repetition_change"), 0.0)
    assert seen[-1] == (4, 4)  # two questions, each asked of two models


def test_two_models_are_compared_pair_by_pair(model: Decoder, tokenizer: TextTokenizer) -> None:
    """The other model gives every token the same likelihood, and answers with the first of the vocabulary."""
    torch.manual_seed(9)
    other = Decoder(model.config, vocab_size=tokenizer.vocab_size).eval().requires_grad_(False)
    torch.nn.init.zeros_(other.lm_head.weight)
    questions = [question("x", "blood"), question("red and the heart", "a muscle")]
    outcome = compare_models(
        model, tokenizer, lambda: (other, tokenizer), questions=questions, max_new_tokens=6, progress=silent
    )
    own, theirs = (
        score_answers(one, tokenizer, questions=questions, max_new_tokens=6, progress=silent) for one in (model, other)
    )
    bits = [
        [nats / math.log(2) / size for nats, size in zip(found.values["nats"], found.values["bytes"], strict=True)]
        for found in (own, theirs)
    ]
    changes = [one - two for one, two in zip(*bits, strict=True)]
    assert outcome.values["bits_per_byte_change"] == pytest.approx(changes, rel=1e-3)
    assert outcome.scores["likelihood_win_rate"] == sum(change < 0 for change in changes) / 2
    assert [example["found"]["text"] for example in outcome.examples] == [example["found"] for example in own.examples]
    assert [example["other"]["text"] for example in outcome.examples] == [example["found"] for example in theirs.examples]
    assert outcome.scores["length_change"] == pytest.approx(
        sum(len(a["found"]) - len(b["found"]) for a, b in zip(own.examples, theirs.examples, strict=True)) / 2
    )


def test_repetition_is_the_share_of_repeated_runs_of_four_tokens() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2, 3]) == 0

"""Generation from the cache equals the whole forward pass, for any batch."""

from typing import Any

import pytest
import torch

from llm.errors import InputError
from llm.inference.generate import generate, generate_one
from llm.inference.sampling import Sampling
from llm.inference.timer import GenerationTimer
from llm.models import architectures
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder

VOCABULARY = 37
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 3, 20, 11, 30], [1, 2], [1, 36, 35, 34, 33]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(3)
    config = DecoderConfig(hidden_size=16, layers=2, heads=4, kv_heads=2, context=24)
    return Decoder(config, vocab_size=VOCABULARY).eval()


def greedy_without_cache(model: Decoder, prompt: list[int], *, limit: int, end: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < limit:
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_greedy_text_from_the_cache_equals_the_whole_forward_pass(model: Decoder, batch_size: int) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12, end=[], batch_size=batch_size)
    assert free == [greedy_without_cache(model, prompt, limit=12, end=-1) for prompt in PROMPTS]
    assert {len(answer) for answer in free} == {12}


def test_an_answer_stops_before_its_end_token_while_others_go_on(model: Decoder) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12, end=[])
    end = free[2][4]
    assert end not in free[2][:4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, end=[end])
    assert stopped == [greedy_without_cache(model, prompt, limit=12, end=end) for prompt in PROMPTS]
    assert stopped[2] == free[2][:4]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_are_those_of_transformers(penalty: float) -> None:
    torch.manual_seed(8)
    config = DecoderConfig(hidden_size=64, layers=3, heads=4, kv_heads=2, context=96)
    model = Decoder(config, vocab_size=512).eval()
    answers = generate(model, PROMPTS, max_new_tokens=40, end=[], sampling=Sampling(repetition_penalty=penalty))
    stock = as_transformers(model)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        inputs = torch.tensor([prompt])
        found = stock.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=40, do_sample=False, repetition_penalty=penalty
        )
        assert answer == found[0, len(prompt) :].tolist()


def as_transformers(model: Decoder) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = architectures()[model.config.name].to_transformers(model.config) | {"vocab_size": model.vocab_size}
    stock = LlamaForCausalLM(LlamaConfig(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    stock.load_state_dict(model.state_dict())
    return stock.eval()


def test_several_tokens_may_end_an_answer(model: Decoder) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12, end=[])
    ends = {free[0][3], free[2][5], free[3][0]}
    for answer, whole in zip(generate(model, PROMPTS, max_new_tokens=12, end=ends), free, strict=True):
        first = next((place for place, token in enumerate(whole) if token in ends), len(whole))
        assert answer == whole[:first]


def test_one_prompt_alone_gives_the_same_tokens_one_by_one(model: Decoder) -> None:
    sampling = Sampling(temperature=1.5, top_k=20, repetition_penalty=1.2, seed=4)
    whole = generate(model, PROMPTS[2:3], max_new_tokens=12, end=[], sampling=sampling)[0]
    tokens = generate_one(model.decoding(), PROMPTS[2], max_new_tokens=12, end=[], sampling=sampling)
    assert [next(tokens) for _ in range(5)] == whole[:5]
    assert list(tokens) == whole[5:]


@pytest.mark.parametrize(("prompt", "found"), [([], "0"), ([1] * 25, "25")])
def test_a_prompt_that_does_not_fit_is_refused(model: Decoder, prompt: list[int], found: str) -> None:
    with pytest.raises(InputError, match=rf"prompt 1: expected from 1 token to the model's context of 24, got {found}$"):
        generate(model, [[1], prompt], max_new_tokens=2, end=[])


def test_an_answer_ends_where_the_context_is_full(model: Decoder) -> None:
    long, full = [1] * 20, [1] * 24
    answers = generate(model, [long, full, [1]], max_new_tokens=10, end=[])
    assert [len(answer) for answer in answers] == [4, 0, 10]


def test_a_sampled_answer_depends_on_seed_and_place_but_not_on_the_batch(model: Decoder) -> None:
    def sampled(seed: int, batch_size: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.5, repetition_penalty=1.1, seed=seed)
        return generate(model, PROMPTS, max_new_tokens=8, end=[], sampling=sampling, batch_size=batch_size)

    assert sampled(1, 5) == sampled(1, 2) == sampled(1, 1)
    assert sampled(1, 5) != sampled(2, 5)
    twice = generate(model, [[1, 5]] * 2, max_new_tokens=8, end=[], sampling=Sampling(temperature=3.0))
    assert twice[0] != twice[1]


def test_answers_do_not_change_when_others_end_and_leave_the_batch(model: Decoder) -> None:
    sampling = Sampling(temperature=1.5, repetition_penalty=1.3)
    free = generate(model, PROMPTS, max_new_tokens=16, end=[], sampling=sampling)
    ends = {answer[place] for answer, place in zip(free[:4], (0, 1, 2, 5), strict=True)} - set(free[4][:12])
    found = generate(model, PROMPTS, max_new_tokens=16, end=ends, sampling=sampling)
    assert len({len(answer) for answer in found}) > 2
    assert all(answer == whole[: len(answer)] for answer, whole in zip(found, free, strict=True))


def test_almost_no_temperature_is_greedy(model: Decoder) -> None:
    cold = generate(model, PROMPTS, max_new_tokens=8, end=[], sampling=Sampling(temperature=1e-6))
    assert cold == generate(model, PROMPTS, max_new_tokens=8, end=[])


def test_the_timer_counts_prompt_and_new_tokens(model: Decoder) -> None:
    timer = GenerationTimer()
    generate(model, PROMPTS, max_new_tokens=4, end=[], timer=timer)
    assert (timer.prompt_tokens, timer.new_tokens) == (sum(map(len, PROMPTS)), 4 * len(PROMPTS))
    assert timer.prompt_seconds > 0
    assert timer.new_seconds > 0

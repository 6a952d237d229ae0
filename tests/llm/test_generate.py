"""Generation: what the cache gives is what the whole forward pass gives, whatever lies beside it in the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.generate import Clock, Draws, Sampling, choose, distribution, generate
from llm.models.llama.config import LlamaConfig
from llm.models.llama.model import Llama

VOCABULARY = 37
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 3, 20, 11, 30], [1, 2], [1, 36, 35, 34, 33]]


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(3)
    config = LlamaConfig(hidden_size=16, layers=2, heads=4, kv_heads=2, context=24)
    return Llama(config, vocab_size=VOCABULARY).eval()


def greedy_without_cache(model: Llama, prompt: list[int], *, limit: int, end: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < limit:
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_greedy_text_from_the_cache_is_that_of_the_whole_forward_pass(model: Llama, batch_size: int) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12, end=[], batch_size=batch_size)
    assert free == [greedy_without_cache(model, prompt, limit=12, end=-1) for prompt in PROMPTS]
    assert {len(answer) for answer in free} == {12}


def test_an_answer_stops_before_its_end_token_while_others_go_on(model: Llama) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12, end=[])
    end = free[2][4]
    assert end not in free[2][:4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, end=[end])
    assert stopped == [greedy_without_cache(model, prompt, limit=12, end=end) for prompt in PROMPTS]
    assert stopped[2] == free[2][:4]


def test_an_answer_ends_where_the_context_is_full(model: Llama) -> None:
    long, full = [1] * 20, [1] * 24
    answers = generate(model, [long, full, [1]], max_new_tokens=10, end=[])
    assert [len(answer) for answer in answers] == [4, 0, 10]


def test_a_sampled_answer_depends_on_seed_and_place_but_not_on_the_batch(model: Llama) -> None:
    def sampled(seed: int, batch_size: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.5, seed=seed)
        return generate(model, PROMPTS, max_new_tokens=8, end=[], sampling=sampling, batch_size=batch_size)

    assert sampled(1, 5) == sampled(1, 2) == sampled(1, 1)
    assert sampled(1, 5) != sampled(2, 5)
    twice = generate(model, [[1, 5]] * 2, max_new_tokens=8, end=[], sampling=Sampling(temperature=3.0))
    assert twice[0] != twice[1]


def test_almost_no_temperature_is_greedy(model: Llama) -> None:
    cold = generate(model, PROMPTS, max_new_tokens=8, end=[], sampling=Sampling(temperature=1e-6))
    assert cold == generate(model, PROMPTS, max_new_tokens=8, end=[])


def test_choices_are_drawn_as_often_as_their_probability() -> None:
    wanted = torch.tensor([0.1, 0.2, 0.7])
    draws = [Draws(0, index) for index in range(20_000)]
    counts = torch.bincount(torch.tensor(choose(wanted.log().expand(20_000, 3), Sampling(temperature=1.0), draws=draws)))
    # Standard error of a share: at most sqrt(0.25 / 20,000) = 0.0035; 4 of them.
    assert torch.allclose(counts / 20_000, wanted, atol=0.014)


def test_top_k_keeps_the_k_likeliest() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.2, 0.3]]).log()
    kept = distribution(logits, Sampling(temperature=1.0, top_k=2))
    torch.testing.assert_close(kept, torch.tensor([[4 / 7, 0, 0, 3 / 7]], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(0.35, 1), (0.45, 2), (0.75, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(top_p: float, kept: int) -> None:
    logits = torch.tensor([[0.4, 0.1, 0.2, 0.3]]).log()
    assert int((distribution(logits, Sampling(temperature=1.0, top_p=top_p)) > 0).sum()) == kept


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_a_distribution_sums_to_one_and_its_mode_is_the_largest_logit(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    row = distribution(torch.tensor([logits]), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))[0]
    assert math.isclose(float(row.sum()), 1, abs_tol=1e-9)
    assert row[logits.index(max(logits))] == row.max()


def test_the_clock_counts_tokens_read_and_written(model: Llama) -> None:
    clock = Clock()
    generate(model, PROMPTS, max_new_tokens=4, end=[], clock=clock)
    assert (clock.prompt_tokens, clock.new_tokens) == (sum(map(len, PROMPTS)), 4 * len(PROMPTS))
    assert clock.prompt_seconds > 0
    assert clock.new_seconds > 0

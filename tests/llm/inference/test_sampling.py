"""Sampling: the distributions are those of Transformers, and tokens are drawn as often as they say."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import InputError
from llm.inference.sampling import Penalties, RandomStream, Sampling, distribution, sample_tokens

CPU = torch.device("cpu")


def test_choices_are_drawn_as_often_as_their_probability() -> None:
    wanted = torch.tensor([0.1, 0.2, 0.7])
    streams = [RandomStream(0, index) for index in range(20_000)]
    counts = torch.bincount(
        torch.tensor(sample_tokens(wanted.log().expand(20_000, 3), Sampling(temperature=1.0), streams=streams))
    )
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


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.2, 4), (0.45, 3), (0.7, 2), (1.0, 1)])
def test_min_p_keeps_tokens_that_are_likely_beside_the_likeliest(min_p: float, kept: int) -> None:
    logits = torch.tensor([[0.4, 0.1, 0.2, 0.3]]).log()
    assert int((distribution(logits, Sampling(temperature=1.0, min_p=min_p)) > 0).sum()) == kept


def test_a_repeated_token_is_penalized_toward_less_likely_whatever_its_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 0.0]]).repeat(2, 1)
    seen = Penalties(Sampling(repetition_penalty=2.0), [[0, 1], [4]], vocab_size=5, device=CPU)
    seen.add([0, 3])
    wanted = torch.tensor([[1.0, -4.0, 1.0, -1.0, 0.0], [2.0, -2.0, 1.0, -2.0, 0.0]])
    torch.testing.assert_close(seen.applied(logits), wanted, rtol=0, atol=0)
    seen.keep([1])
    torch.testing.assert_close(seen.applied(logits[1:]), wanted[1:], rtol=0, atol=0)


def test_presence_counts_a_token_once_and_frequency_each_time_and_the_prompt_for_nothing() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: -100.0, 0: 2.0})
    penalties = Penalties(sampling, [[0, 1], [4]], vocab_size=5, device=CPU)
    for tokens in ([2, 3], [2, 1], [0, 3]):
        penalties.add(tokens)
    wanted = torch.tensor([[2 - 0.75, 0, -1.0, 0, -100], [2, -0.75, 0, -1.0, -100]])
    torch.testing.assert_close(penalties.applied(torch.zeros(2, 5)), wanted)
    penalties.keep([1])
    torch.testing.assert_close(penalties.applied(torch.zeros(1, 5)), wanted[1:])


def test_a_bias_for_a_token_that_no_model_has_is_refused() -> None:
    with pytest.raises(InputError, match="logit_bias: expected tokens from 0 to 4, got 5"):
        Penalties(Sampling(logit_bias={5: 1.0}), [[0]], vocab_size=5, device=CPU)


@pytest.fixture(scope="module")
def stock() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.4},
        {"min_p": 0.6},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7, "top_k": 50, "top_p": 0.8, "min_p": 0.3},
    ],
)
@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_distributions_are_those_of_transformers(stock: Any, options: dict[str, Any], temperature: float) -> None:
    prompts = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        stock.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    found = stock.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=1,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        temperature=temperature,
        **{"top_k": 0} | options,  # its default is 50
    )
    sampling = Sampling(temperature=temperature, **options)
    logits = found.logits[0]
    penalties = Penalties(sampling, prompts.tolist(), vocab_size=300, device=CPU)
    ours = distribution(penalties.applied(logits), sampling)
    theirs = found.scores[0].double().softmax(-1)
    assert ((ours > 0) == (theirs > 0)).all()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
)
def test_a_distribution_sums_to_one_and_its_mode_is_the_largest_logit(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    row = distribution(torch.tensor([logits]), sampling)[0]
    assert math.isclose(float(row.sum()), 1, abs_tol=1e-9)
    assert row[logits.index(max(logits))] == row.max()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": -0.1}, "temperature: expected a number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected a number of at least 0, got nan"),
        ({"top_k": 0}, "top_k: expected a whole number of at least 1, got 0"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: expected a number above 0 and at most 1, got 1.5"),
        ({"min_p": -1.0}, "min_p: expected a number from 0 to 1, got -1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0, got 0.0"),
    ],
)
def test_a_value_outside_its_range_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**options)
    assert str(caught.value) == told

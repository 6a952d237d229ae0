"""Batches are as large as memory holds, whatever is in them; what does not fit is halved, and nothing that is done is lost."""

import math

import pytest
import torch
from limited_memory import memory_left

from llm.errors import InputError
from llm.inference.batches import Limits, similar_lengths, work_in_batches
from llm.inference.generate import generate
from llm.inference.likelihood import Choice, Window, continuation_likelihoods, negative_log_likelihoods
from llm.inference.processes import ALONE
from llm.inference.sampling import Sampling
from llm.inference.timer import GenerationTimer
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder

MIB = 2**20
GIB = 2**30


def deep_model() -> Decoder:
    """A model with much cache for little arithmetic: 64 KiB a position."""
    torch.manual_seed(1)
    return Decoder(DecoderConfig(hidden_size=16, layers=16, heads=8, head_size=64, context=140), vocab_size=40).eval()


def wide_model(context: int = 8192) -> Decoder:
    """A model of the largest vocabulary in use: a position has 1 MiB of logits in fp32."""
    torch.manual_seed(1)
    return Decoder(DecoderConfig(hidden_size=8, layers=1, heads=2, context=context), vocab_size=2**18).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = [128, 40, 125, 3, 120, 117, 125, 20, 128, 122, 128, 128]
    return [torch.randint(40, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def free(prompts: list[list[int]]) -> list[list[int]]:
    return generate(deep_model(), prompts, max_new_tokens=4, end=[])


def test_prompts_share_a_batch_as_far_as_their_caches_fit_the_memory_that_is_left(
    prompts: list[list[int]], free: list[list[int]]
) -> None:
    decoding = deep_model().decoding()
    assert decoding.bytes_per_position == 64 * 2**10
    done: list[int] = []
    with memory_left(64 * MIB):  # all 12 would take 102
        found = generate(decoding, prompts, max_new_tokens=4, end=[], progress=done.append)
    assert found == free
    assert len(done) > 2 and done[-1] == 12


def test_the_batch_of_a_model_of_1_7b_fits_16_gib() -> None:
    """SmolLM2-1.7B has 24 layers of 32 key and value heads; 32 prompts of 4,096 tokens would take 48 GiB in fp32."""
    each = 24 * 2 * 32 * 64 * 4
    limits = Limits(rows=32, memory=16 * GIB, bytes_per_token=each, bytes_per_row=49152 * 16)
    batches = list(similar_lengths(dict.fromkeys(range(32), 4096) | dict.fromkeys(range(32, 64), 128), limits))
    assert 32 * 4096 * each == 48 * GIB
    assert [len(batch) for batch in batches] == [10, 10, 10, 10, 24]
    assert all(len(batch) * (4096 if batch[0] < 32 else 128) * each <= 16 * GIB for batch in batches)


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_answers(prompts: list[list[int]]) -> None:
    sampling = Sampling(temperature=1.0, repetition_penalty=1.2)
    wanted = generate(deep_model(), prompts, max_new_tokens=4, end=[], sampling=sampling)
    decoding = deep_model().decoding()
    with memory_left(96 * MIB):  # the cache of all 12 takes 102; much less, and oneDNN fails instead, for good
        found = generate(decoding, prompts, max_new_tokens=4, end=[], sampling=sampling, memory=math.inf)
    assert found == wanted


def test_what_was_done_before_memory_ran_out_is_not_done_again() -> None:
    seen: list[list[int]] = []
    released: list[bool] = []

    def work(batch: list[int], timer: GenerationTimer) -> list[int]:
        seen.append(batch)
        if len(batch) > 2:
            torch.empty(2**60, dtype=torch.uint8)  # the allocator's own error
        timer.new_tokens += len(batch)
        return [10 * index for index in batch]

    timer, done = GenerationTimer(), list[int]()
    found = work_in_batches(
        [[0], [5, 4, 3, 2, 1], [9, 8, 7, 6]],
        work,
        processes=ALONE,
        timer=timer,
        release=lambda: released.append(True),
        progress=lambda rows, total: done.append(rows),
    )
    assert found == {index: 10 * index for index in range(10)}
    # Halved where it failed; the batch after it comes in parts of the size that fits at once.
    assert seen == [[0], [5, 4, 3, 2, 1], [5, 4], [3, 2], [1], [9, 8], [7, 6]]
    assert (done, timer.new_tokens, len(released)) == ([1, 6, 10], 10, 1)


def test_one_row_that_does_not_fit_is_the_error_of_the_allocator() -> None:
    def work(batch: list[int], timer: GenerationTimer) -> list[int]:
        torch.empty(2**60, dtype=torch.uint8)
        return batch

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        work_in_batches([[0, 1]], work, processes=ALONE, timer=GenerationTimer())


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def work(batch: list[int], timer: GenerationTimer) -> list[int]:
        raise InputError("rows.jsonl:1: no")

    with pytest.raises(InputError, match=r"rows.jsonl:1: no"):
        work_in_batches([[0, 1]], work, processes=ALONE, timer=GenerationTimer())


def test_a_large_batch_and_a_long_one_do_not_make_a_cache_for_both() -> None:
    decoding = deep_model().decoding()
    with memory_left(48 * MIB), torch.inference_mode():
        decoding.read([[1]] * 60, room=7)  # 30 MiB
        decoding.release()
        decoding.read([[1]] * 60, room=7)
        decoding.read([[1] * 128], room=8)  # 9 MiB; 60 rows of 136 would be 510


def test_a_long_prompt_is_read_in_memory_that_grows_with_its_length_not_with_its_square() -> None:
    model = wide_model()
    tokens = torch.randint(100, (8192,), generator=torch.Generator().manual_seed(0)).tolist()
    decoding = model.decoding()
    with torch.inference_mode():
        decoding.read([tokens[:256]], room=1)  # whatever torch takes once
        with memory_left(160 * MIB):  # probabilities of all pairs of two heads would take 256 MiB
            logits = decoding.read([tokens], room=1)
            assert negative_log_likelihoods(model, [Window(tokens[:-1], [-100] * 8190 + tokens[-1:])])[0] > 0
    assert torch.isfinite(logits).all()


def test_likelihoods_never_hold_the_logits_of_a_whole_batch() -> None:
    model = wide_model(1024)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2**18, (6, 81), generator=generator).tolist()
    windows = [Window(row[:-1], row[1:]) for row in tokens]
    choices = [Choice(row[:4], [row[4:40], row[40:]]) for row in tokens]
    model.decoding()
    negative_log_likelihoods(model, windows[:1])
    with memory_left(400 * MIB):  # logits of all positions are 480 MiB, and those of all continuations 450
        nats = negative_log_likelihoods(model, windows)
        found = continuation_likelihoods(model, choices)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens[3][:-1]]))[0].log_softmax(-1)
        wanted = -logits.gather(-1, torch.tensor(tokens[3][1:])[:, None]).double().sum()
        answer = torch.tensor(tokens[3][4:40])
        assert nats[3] == pytest.approx(float(wanted), rel=1e-5)
        assert found[3][0] == pytest.approx(float(logits[3:39].gather(-1, answer[:, None]).double().sum()), rel=1e-5)

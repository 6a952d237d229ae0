"""The kernel for a step of a few rows equals the model, whatever was decoded before it, and for models of any size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from decoded_rows import LENGTHS, computed, decoded, rows_of, small

from llm.adapters.lora import LoraConfig, attach
from llm.errors import InputError
from llm.inference.generate import generate
from llm.models.decoder import row_step
from llm.models.decoder.model import Decoder
from llm.models.decoder.row_step import MOST_ROWS, RowStep
from llm.models.interface import Decoding

pytestmark = pytest.mark.usefixtures("compiled_code")
ODD: list[dict[str, object]] = [  # no size but the head's is even, and no product fills whole vectors
    {"hidden_size": 45, "heads": 3, "kv_heads": 1, "head_size": 14, "intermediate_size": 77},
    {"hidden_size": 33, "heads": 5, "kv_heads": 5, "head_size": 2, "intermediate_size": 1},
    {"hidden_size": 3, "heads": 1, "head_size": 34, "intermediate_size": 131, "tied": False},
]


@torch.inference_mode()
def compiled(model: Decoder) -> Decoding:
    decoding = model.decoding()
    decoding.compile()
    return decoding


@pytest.fixture
def rows_stepped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the kernel had."""
    stepped: list[int] = []
    logits = RowStep.logits

    def noted(self: RowStep, embedded: torch.Tensor, *rest: Any) -> torch.Tensor:
        stepped.append(len(embedded))
        return logits(self, embedded, *rest)

    monkeypatch.setattr(RowStep, "logits", noted)
    return stepped


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("changes", [{"kv_heads": 2}, {"tied": False, "head_size": 12}, *ODD])
def test_texts_of_any_length_equal_the_whole_forward_pass(changes: dict[str, object], rows_stepped: list[int]) -> None:
    model = small(**changes)
    decoding = compiled(model)
    for length, more in ((7, 8), (1, 31), (24, 8), (3, 1)):  # up to the whole context of 32
        rows = rows_of([length], more=more)
        found = decoded(decoding, rows, read=[length])
        torch.testing.assert_close(found, computed(model, rows, read=[length]), atol=1e-5, rtol=1e-5)
    assert rows_stepped == [1] * (8 + 31 + 8 + 1)


@pytest.mark.parametrize("changes", ODD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_a_step_is_exact_for_weights_of_any_size_and_dtype(changes: dict[str, object], dtype: torch.dtype) -> None:
    model, rows = small(**changes).to(dtype), rows_of([1], more=20)
    decoding = compiled(model)
    decoding.read([[0]], room=21)
    decoding._batch.positions.zero_()  # type: ignore[attr-defined]  # begin anew: what is read at once is rounded
    found = torch.cat([decoding.step([token]) for token in rows[0]])
    torch.testing.assert_close(found.double(), model.double()(torch.tensor(rows))[0], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("context", [512, 4096, 8192, 131_072])
def test_texts_of_long_contexts_equal_the_plain_step(context: int) -> None:
    model = small(context=context, layers=1, heads=2, hidden_size=16)
    decoding, plain = compiled(model), model.decoding()
    for length in {3, min(context, 4100) - 8}:
        rows = rows_of([length])
        found, wanted = decoded(decoding, rows, read=[length]), decoded(plain, rows, read=[length])
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_the_memory_of_a_long_context_is_taken_when_it_is_used() -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    model = small(context=100_000, layers=1, heads=8, head_size=64)
    decoding = compiled(model)
    before = resident()
    with torch.inference_mode():
        decoding.read([[1, 2, 3]], room=90_000)  # 90,000 slots, each of 2 * 8 heads of 64 in fp32: 369 MB
        decoding.step([4])
    cache = 90_000 * 16 * 64 * 4  # bytes of all slots; the cosine and sine of each take an eighth of that
    assert resident() - before < cache / 2


def test_bf16_weights_are_nearer_to_fp32_than_the_model_itself_is() -> None:
    model, rows = small(kv_heads=2), rows_of([5], more=27)
    exact = torch.cat(computed(model, rows, read=[5]))
    model.bfloat16()
    own = (torch.cat(computed(model, rows, read=[5])) - exact).square().mean().sqrt()
    found = (torch.cat(decoded(compiled(model), rows, read=[5])) - exact).square().mean().sqrt()
    assert 0 < found < own


def test_batches_of_any_size_follow_each_other(rows_stepped: list[int]) -> None:
    model = small(kv_heads=2)
    decoding = compiled(model)
    for lengths, more in (([6], 9), ([20, 3, 9, 14], 12), ([2, 5, 3, 1, 4], 5), ([30, 1], 2), ([25, 2, 9], 7)):
        rows = rows_of(lengths, more=more)
        found = decoded(decoding, rows, read=lengths)
        torch.testing.assert_close(found, computed(model, rows, read=lengths), atol=1e-5, rtol=1e-5)
    assert rows_stepped == [1] * 9 + [4] * 12 + [2] * 2 + [3] * 7, "five rows are more than MOST_ROWS"
    assert MOST_ROWS == 4


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_neither_other_rows_nor_threads_change_a_bit(dtype: torch.dtype) -> None:
    model = small(**ODD[0]).to(dtype)
    decoding, rows = compiled(model), rows_of(LENGTHS)
    together = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        together.append(torch.cat(decoded(decoding, rows, read=LENGTHS)))
    assert torch.equal(together[0], together[1]) and torch.equal(together[0], together[2])
    with torch.inference_mode():
        decoding.read([row[:size] for row, size in zip(rows, LENGTHS, strict=True)], room=1)
        cache, positions = decoding._batch.stored.clone(), decoding._batch.positions.clone()  # type: ignore[attr-defined]
        all_four = decoding.step([1, 2, 3, 4])
        for row in range(4):  # alone, over the same keys and values
            batch = decoding._batch  # type: ignore[attr-defined]
            decoding._batch = type(batch)(cache[:, [row]], positions[[row]].clone())  # type: ignore[attr-defined]
            assert torch.equal(decoding.step([row + 1])[0], all_four[row])


def test_the_last_rows_of_a_batch_continue_by_the_kernel(rows_stepped: list[int]) -> None:
    model, prompts = small(kv_heads=2), rows_of([4, 9, 2, 6, 3, 8], more=0)
    plain = generate(model, prompts, max_new_tokens=8, end=())
    end = [answer[1] for answer in plain[:3]]
    wanted = generate(model, prompts, max_new_tokens=8, end=end)
    assert min(map(len, wanted)) < max(map(len, wanted))
    assert generate(compiled(model), prompts, max_new_tokens=8, end=end) == wanted
    assert rows_stepped and max(rows_stepped) <= MOST_ROWS


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]])
def test_a_model_with_an_adapter_is_decoded_without_the_kernel(targets: Any, rows_stepped: list[int]) -> None:
    model = small(tied=False)
    attach(model, LoraConfig(r=2, alpha=4, target_modules=targets), seed=1)
    decoded(compiled(model.eval()), rows_of([3]), read=[3])
    assert not rows_stepped


def test_a_context_of_one_token_compiles() -> None:
    model, rows = small(context=1), [[7]]
    assert generate(compiled(model), rows, max_new_tokens=3, end=()) == generate(model, rows, max_new_tokens=3, end=()) == [[]]


@pytest.fixture
def built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of compiled code, and an empty PATH."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("PATH", str(tmp_path))
    row_step.load_kernel.cache_clear()
    yield tmp_path
    row_step.load_kernel.cache_clear()


def compiler_of(folder: Path, script: str) -> str:
    """A compiler that is this shell script."""
    program = folder / "g++"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o700)
    return str(program)


def test_without_a_compiler_compiling_is_refused_and_decoding_is_not(
    built_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    model, rows = small(), rows_of([3])
    decoding = model.decoding()
    with pytest.raises(InputError, match=r"compiling: expected g\+\+ or clang\+\+ to build it, got no C\+\+ compiler"):
        decoding.compile()
    torch.testing.assert_close(decoded(decoding, rows, read=[3]), computed(model, rows, read=[3]), atol=1e-5, rtol=1e-5)


def test_a_compiler_that_fails_is_named_with_its_error(built_anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler_of(built_anew, "echo hi >&2; echo 'a.cpp:1: error: what is that' >&2; exit 1"))
    with pytest.raises(InputError, match=r"compiling: .*g\+\+: a.cpp:1: error: what is that"):
        compiled(small())
    assert not list((built_anew / "compiled" / "decoding").iterdir())


def test_a_compiler_without_openmp_builds_a_kernel_of_one_thread(built_anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")
    script = 'case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac; exec /usr/bin/g++ "$@"'
    monkeypatch.setenv("CXX", compiler_of(built_anew, script))
    model, rows = small(), rows_of([3])
    torch.testing.assert_close(decoded(compiled(model), rows, read=[3]), computed(model, rows, read=[3]), atol=1e-5, rtol=1e-5)


def test_weights_of_another_dtype_are_refused() -> None:
    with pytest.raises(InputError, match=r"compiling: expected weights in bf16 or fp32, got torch.float64"):
        compiled(small().double())

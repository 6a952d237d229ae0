"""The compiled step of one row equals the model, whatever was decoded before it."""

from typing import Any

import psutil
import pytest
import torch
from decoded_rows import computed, decoded, rows_of, small

from llm import device
from llm.adapters.lora import LoraConfig, attach
from llm.errors import InputError
from llm.inference.generate import generate
from llm.models.decoder import compiled_decode, decode
from llm.models.decoder.model import Decoder
from llm.models.interface import Decoding

pytestmark = [
    pytest.mark.usefixtures("compiled_code"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@torch.inference_mode()
def compiled(model: Decoder) -> Decoding:
    decoding = model.decoding()
    decoding.compile()
    return decoding


@pytest.fixture
def rows_stepped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that went through a compiled step."""
    stepped: list[int] = []
    logits = compiled_decode.CompiledRow.logits

    def noted(self: compiled_decode.CompiledRow, token: int, *rest: torch.Tensor) -> torch.Tensor:
        stepped.append(token)
        return logits(self, token, *rest)

    monkeypatch.setattr(compiled_decode.CompiledRow, "logits", noted)
    return stepped


@pytest.mark.parametrize("changes", [{"kv_heads": 2}, {"tied": False, "head_size": 12}])
def test_texts_of_any_length_equal_the_whole_forward_pass(changes: dict[str, object], rows_stepped: list[int]) -> None:
    model = small(**changes)
    decoding = compiled(model)
    rows_stepped.clear()
    for length, more in ((7, 8), (1, 31), (24, 8), (3, 1)):  # up to the whole context of 32
        rows = rows_of([length], more=more)
        found = decoded(decoding, rows, read=[length])
        torch.testing.assert_close(found, computed(model, rows, read=[length]), atol=1e-5, rtol=1e-5)
    assert len(rows_stepped) == 8 + 31 + 8 + 1


def test_one_compilation_serves_all_layers_and_lengths() -> None:
    decoding = compiled(small(kv_heads=1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (1, 5, 20):
            decoded(decoding, rows_of([length]), read=[length])


@pytest.mark.parametrize("context", [*(pytest.param(size, marks=pytest.mark.long) for size in (512, 4096, 8192)), 131_072])
def test_long_contexts_compile_and_one_compilation_serves_all_of_their_slots(context: int) -> None:
    model = small(context=context, layers=1, heads=2, hidden_size=16)
    decoding, plain = compiled(model), model.decoding()
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in {3, min(context, 4100) - 8}:  # over the 4,096 that sums have for a limit
            rows = rows_of([length])
            found, wanted = decoded(decoding, rows, read=[length]), decoded(plain, rows, read=[length])
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_the_memory_of_a_long_context_is_taken_when_it_is_used() -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    model = small(context=100_000, layers=1, heads=2, head_size=64)
    decoding = model.decoding()
    before = resident()
    with torch.inference_mode():
        decoding.read([[1, 2, 3]], room=90_000)  # 90,000 slots, each of 2 * 2 heads of 64 in fp32: 92 MB
        decoding.step([4])
    cache = 90_000 * 4 * 64 * 4  # bytes of all slots; the cosine and sine of each take half of that
    assert resident() - before < cache


def test_bf16_weights_are_as_near_to_fp32_as_the_model_itself_is() -> None:
    model, rows = small(kv_heads=2), rows_of([5], more=27)
    exact = torch.cat(computed(model, rows, read=[5]))
    model.bfloat16()
    own = (torch.cat(computed(model, rows, read=[5])) - exact).square().mean().sqrt()
    found = (torch.cat(decoded(compiled(model), rows, read=[5])) - exact).square().mean().sqrt()
    assert 0 < found < 1.1 * own


def test_batches_between_texts_of_one_row_change_nothing(rows_stepped: list[int]) -> None:
    model = small(kv_heads=2)
    decoding = compiled(model)
    rows_stepped.clear()
    for lengths, more in (([6], 9), ([20, 3, 9, 14], 12), ([2], 5), ([30, 1], 2), ([25], 7)):
        rows = rows_of(lengths, more=more)
        found = decoded(decoding, rows, read=lengths)
        torch.testing.assert_close(found, computed(model, rows, read=lengths), atol=1e-5, rtol=1e-5)
    assert len(rows_stepped) == 9 + 5 + 7


def test_the_last_row_of_a_batch_continues_uncompiled() -> None:
    model, prompts = small(kv_heads=2), rows_of([4, 9], more=0)
    plain = generate(model, prompts, max_new_tokens=8, end=())
    end = plain[0][1]
    wanted = generate(model, prompts, max_new_tokens=8, end=[end])
    assert len(wanted[0]) == 1 and len(wanted[1]) > 2
    assert generate(compiled(model), prompts, max_new_tokens=8, end=[end]) == wanted


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]])
def test_a_model_with_an_adapter_is_not_compiled(targets: Any, rows_stepped: list[int]) -> None:
    model = small(tied=False)
    attach(model, LoraConfig(r=2, alpha=4, target_modules=targets), seed=1)
    decoded(compiled(model.eval()), rows_of([3]), read=[3])
    assert not rows_stepped


def test_a_context_of_one_token_compiles() -> None:
    model, rows = small(context=1), [[7]]
    assert generate(compiled(model), rows, max_new_tokens=3, end=()) == generate(model, rows, max_new_tokens=3, end=()) == [[]]


def test_without_a_compiler_compiling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "has_compiler", lambda device: False)
    assert device.has_compiler("cpu")  # but here is one
    with pytest.raises(InputError, match=r"expected a C\+\+ compiler \(CXX, g\+\+ or clang\+\+\), got none"):
        compiled(small())

"""The attention kernel: its values and gradients, what it does not see, and trainings that use it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import MadeUpRows, tiny_model, tiny_training
from torch import Tensor

from llm.adapters import lora
from llm.errors import Interrupted
from llm.layers import fused_attention
from llm.layers.attention import attend, attention_mask
from llm.layers.cpp_kernel import UnavailableError
from llm.layers.fused_attention import is_supported, load_kernel
from llm.training.config import Budget
from llm.training.distributed.process_group import ProcessGroup
from llm.training.runtime import WORTH, Runtime, resolve_fused_attention, restore_runtime
from llm.training.task import ComputeConfig
from llm.training.validation import Validation

pytestmark = [
    pytest.mark.skipif(
        not fused_attention.is_cpu_supported(), reason="the kernel is for CPUs with AVX512-BF16 and without AMX"
    ),
    pytest.mark.usefixtures("compiled_code"),
]
TRAINING: dict[str, Any] = {
    "rows": MadeUpRows(context=32),
    "validation": Validation(MadeUpRows(context=32, rows_per_epoch=4, seed=9, bytes_per_token=3.0)),
    "batch_tokens": 4 * 32,
    "budget": Budget(steps=6),
    "precision": "bf16",
    "fused_attention": True,
}


def inputs(rows: int, heads: int, kv_heads: int, length: int, size: int) -> list[Tensor]:
    """q, k, v and the gradient of the result."""
    torch.manual_seed(0)
    shapes = [(rows, count, length, size) for count in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape).mul(2).bfloat16() for shape in shapes]


def documents(rows: int, length: int) -> Tensor:
    """Of lengths that fit no block."""
    torch.manual_seed(1)
    return (torch.rand(rows, length) < 0.03).cumsum(1)


def computed(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, among: Tensor | None, fused: bool) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    learned = [x.detach().requires_grad_() for x in (q, k, v)]
    mask = attention_mask(q.shape[2], documents=among, device=q.device, fused=fused)
    out = attend(learned[0], learned[1], learned[2], mask=mask)
    return [out, *torch.autograd.grad(out, learned, grad)]


@pytest.mark.parametrize("shared_by", [1, 2, 4])
@pytest.mark.parametrize("size", [32, 64, 96, 128])
@pytest.mark.parametrize("length", [32, 96, 256])
@pytest.mark.parametrize("told", [True, False])
def test_values_and_gradients_are_nearer_to_the_exact_ones_than_those_of_blocks(
    shared_by: int, size: int, length: int, told: bool
) -> None:
    given, among = inputs(3, 4, 4 // shared_by, length, size), documents(3, length) if told else None
    exact = computed(*(x.double() for x in given), among=among, fused=False)
    fused = computed(*given, among=among, fused=True)
    blocks = computed(*given, among=among, fused=False)
    for ours, plain, wanted in zip(fused, blocks, exact, strict=True):
        off, plainly_off = ((x.double() - wanted).norm() / wanted.norm() for x in (ours, plain))
        assert off < 0.006 and off < plainly_off


def test_nothing_reaches_a_position_from_the_future_or_another_document() -> None:
    q, k, v, _ = inputs(2, 4, 2, 128, 32)
    among = documents(2, 128)
    same = (among[:, :, None] == among[:, None, :]).tril()
    k, v = (x.requires_grad_() for x in (k, v))
    out = attend(q, k, v, mask=attention_mask(128, documents=among, device=q.device, fused=True))
    for position in (0, 1, 7, 8, 31, 32, 63, 64, 100, 127):
        reached = torch.autograd.grad(out[:, :, position].float().square().sum(), (k, v), retain_graph=True)
        assert torch.equal((reached[1] != 0).any(3).any(1), same[:, position])
        assert not ((reached[0] != 0).any(3).any(1) & ~same[:, position]).any()
    first = among == among[:, :1]
    changed = (torch.where(first[:, None, :, None], x, 1e4) for x in (k, v))
    again = attend(q, *changed, mask=attention_mask(128, documents=among, device=q.device, fused=True))
    assert torch.equal(again.transpose(1, 2)[first], out.transpose(1, 2)[first])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_neither_threads_nor_the_layout_in_memory_change_a_bit() -> None:
    given, among = inputs(3, 4, 2, 96, 64), documents(3, 96)
    torch.set_num_threads(1)
    once = computed(*given, among=among, fused=True)
    torch.set_num_threads(2)
    laid_out = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    for again in (computed(*given, among=among, fused=True), computed(*laid_out, among=among, fused=True)):
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_scores_of_any_size_have_finite_weights() -> None:
    q, k, v, grad = inputs(1, 2, 2, 64, 64)
    for x in computed(q * 1000, k * 1000, v, grad, among=None, fused=True):
        assert bool(x.isfinite().all())


def test_an_expanded_gradient_is_accepted() -> None:
    q, k, v, grad = inputs(1, 2, 2, 32, 32)
    wanted = computed(q, k, v, torch.ones_like(grad), among=None, fused=True)
    found = computed(q, k, v, torch.ones((), dtype=grad.dtype).expand(grad.shape), among=None, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_training_with_the_kernel_learns_the_same(tmp_path: Path) -> None:
    found = []
    for fused in (False, True):
        model = tiny_model(head_size=32, context=32)
        metrics = tiny_training(model, tmp_path / str(fused), **TRAINING | {"fused_attention": fused})
        assert metrics["choices"]["fused_attention"] is fused
        found.append(metrics["validation_loss"])
    assert found[1] == pytest.approx(found[0], abs=0.02) and found[1] != found[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_an_interrupted_training_ends_bit_for_bit_where_an_uninterrupted_one_does(recompute: bool, tmp_path: Path) -> None:
    def model() -> Any:
        made = tiny_model(head_size=32, context=32, dropout=0.1)
        made.recompute = recompute
        return made

    calls = iter(range(10**6))
    whole, resumed = model(), model()
    tiny_training(whole, tmp_path / "whole", **TRAINING)
    with pytest.raises(Interrupted):
        tiny_training(model(), tmp_path / "parts", **TRAINING, should_stop=lambda: next(calls) > 3)
    metrics = tiny_training(resumed, tmp_path / "parts", **TRAINING | {"fused_attention": "auto"})
    assert metrics["choices"]["fused_attention"] is True  # what was decided first stays
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("sizes", [{"head_size": 16}, {"head_size": 32, "context": 24}])
def test_a_model_of_unsupported_sizes_trains_without_the_kernel(sizes: dict[str, int], tmp_path: Path) -> None:
    context, lines = sizes.get("context", 32), list[dict[str, Any]]()
    changes = TRAINING | {"rows": MadeUpRows(context=context), "batch_tokens": 4 * context, "validation": None}
    metrics = tiny_training(tiny_model(**{"context": 32} | sizes), tmp_path, **changes, lines=lines)
    assert metrics["choices"]["fused_attention"] is False
    found = f"multiples of 32, got bf16, {context}, {sizes['head_size']}"
    assert [line for line in lines if found in line.get("note", "")]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("", "expected g++ or clang++ to build it, got no C++ compiler"),
        ("echo hi >&2; echo 'a.cpp:1: error: what is that' >&2; exit 1", "error: what is that"),
        ('for last; do :; done; echo text > "$last"', ""),  # what the loader says of it
    ],
)
def test_where_the_kernel_cannot_be_built_training_continues_without_it(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("PATH", "/bin" if compiler else str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    if compiler:
        (tmp_path / "cxx").write_text(f"#!/bin/sh\n{compiler}\n", encoding="utf-8")
        (tmp_path / "cxx").chmod(0o700)
    load_kernel.cache_clear()
    lines: list[dict[str, Any]] = []
    metrics = tiny_training(tiny_model(head_size=32, context=32), tmp_path, **TRAINING, lines=lines)
    load_kernel.cache_clear()
    assert metrics["choices"]["fused_attention"] is False
    (note,) = [line["note"] for line in lines if "goes on without it" in line.get("note", "")]
    assert note.startswith("attention has no kernel here, so training goes on without it: ") and reason in note
    assert not compiler or not reason or not list((tmp_path / "compiled" / "attention").iterdir())


def test_the_kernel_is_built_once_and_not_kept_without_a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        load_kernel.cache_clear()
        load_kernel()
        (built,) = (tmp_path / "attention").iterdir()
        assert built.suffix == ".so"
        monkeypatch.setattr("subprocess.run", lambda *arguments, **options: pytest.fail("it is built again"))
    monkeypatch.undo()
    load_kernel.cache_clear()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    before = set(tmp_path.rglob("*"))
    load_kernel()
    load_kernel.cache_clear()
    assert set(tmp_path.rglob("*")) == before


def test_a_kernel_that_does_not_load_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "whole"))
    load_kernel.cache_clear()
    load_kernel()
    (whole,) = (tmp_path / "whole" / "attention").iterdir()
    short = tmp_path / "short" / "attention" / whole.name
    short.parent.mkdir(parents=True)
    short.write_bytes(b"")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "short"))
    load_kernel.cache_clear()
    load_kernel()
    load_kernel.cache_clear()
    assert short.read_bytes() == whole.read_bytes()


def test_a_cache_folder_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attention").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    load_kernel.cache_clear()
    with pytest.raises(UnavailableError, match=r"attention"):
        load_kernel()
    load_kernel.cache_clear()


def test_with_fewer_heads_than_threads_the_kernel_is_not_used(tmp_path: Path, threads: None) -> None:
    lines: list[dict[str, Any]] = []
    metrics = tiny_training(
        tiny_model(head_size=32, context=32, kv_heads=1), tmp_path, **TRAINING | {"cores": 2, "micro_batch": 1}, lines=lines
    )
    assert metrics["choices"]["fused_attention"] is False
    assert [line for line in lines if "for each of 2 threads, got 1 in a micro-batch" in line.get("note", "")]


def test_an_adapter_learns_what_it_does_without_the_kernel(tmp_path: Path) -> None:
    found = []
    for fused in (False, True):
        model = tiny_model(head_size=32, context=32)
        lora.attach(model, lora.LoraConfig(r=4, alpha=8, target_modules=("v_proj",)), seed=1)
        metrics = tiny_training(model, tmp_path / str(fused), **TRAINING | {"fused_attention": fused})
        assert metrics["choices"]["fused_attention"] is fused
        found.append(metrics["validation_loss"])
    assert found[1] == pytest.approx(found[0], abs=0.01) and found[1] != found[0]


def test_a_training_that_continues_on_a_gpu_drops_the_kernel() -> None:
    class OnGpu:
        device, size = torch.device("cuda"), 1

    kept = Runtime("bf16", 8, 1, 1, "cpu", fused_attention=True)
    on_gpu: Any = OnGpu()
    assert not restore_runtime(asdict(kept), ComputeConfig(cores=1), group=on_gpu).fused_attention
    assert restore_runtime(asdict(kept), ComputeConfig(cores=1), group=ProcessGroup()).fused_attention


def test_auto_uses_the_kernel_for_long_trainings_in_bf16_on_a_cpu() -> None:
    def resolved(**changes: Any) -> bool:
        asked: dict[str, Any] = {"wanted": "auto", "device": "cpu", "precision": "bf16", "flops": 1.1 * WORTH}
        return resolve_fused_attention(**asked | changes)

    assert resolved() and resolved(wanted=True, flops=1.0)
    others: list[dict[str, Any]] = [{"flops": WORTH}, {"precision": "fp32"}, {"device": "cuda"}, {"wanted": False}]
    assert not any(resolved(**change) for change in others)
    assert is_supported(64, 32, torch.bfloat16)
    assert (
        not is_supported(40, 32, torch.bfloat16)
        and not is_supported(64, 40, torch.bfloat16)
        and not is_supported(64, 32, torch.float32)
    )


def test_an_unsupported_cpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    load_kernel.cache_clear()
    with pytest.raises(UnavailableError, match="not one for which"):
        load_kernel()
    load_kernel.cache_clear()
    assert not resolve_fused_attention("auto", device="cpu", precision="bf16", flops=1e30)

"""The decoding form of a model computes what the model computes: with adapters and in four bits, for any batch and cache."""

import pytest
import torch
from decoded_rows import LENGTHS, computed, decoded, rows_of, small, texts

from llm.adapters.lora import LoraConfig, adapted_layers, attach, quantize
from llm.models.decoder import decoding_layer


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"kv_heads": 1}, {"tied": False, "head_size": 12}])
def test_step_by_step_decoding_equals_the_whole_forward_pass(changes: dict[str, object]) -> None:
    model, rows = small(**changes), rows_of(LENGTHS)
    found = decoded(model.decoding(), rows, read=LENGTHS)
    torch.testing.assert_close(found, computed(model, rows, read=LENGTHS), atol=1e-5, rtol=1e-5)


def test_steps_over_all_slots_as_on_a_gpu_equal_the_whole_forward_pass() -> None:
    model, rows = small(kv_heads=2), rows_of(LENGTHS)
    decoding = model.decoding()
    decoding._over_all_slots = True  # as on a GPU: no other way to see this form on a CPU
    torch.testing.assert_close(
        decoded(decoding, rows, read=LENGTHS), computed(model, rows, read=LENGTHS), atol=1e-5, rtol=1e-5
    )


def test_bf16_weights_are_as_near_to_fp32_as_the_model_itself_is() -> None:
    model, rows = small(kv_heads=2), rows_of(LENGTHS)
    exact = torch.cat(computed(model, rows, read=LENGTHS))
    model.bfloat16()
    own = (torch.cat(computed(model, rows, read=LENGTHS)) - exact).square().mean().sqrt()
    found = (torch.cat(decoded(model.decoding(), rows, read=LENGTHS)) - exact).square().mean().sqrt()
    assert 0 < found < 1.1 * own


@pytest.mark.parametrize("rows", [1, decoding_layer.MANY_ROWS - 1, decoding_layer.MANY_ROWS, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_without_units_for_them_are_those_in_fp32_of_many_rows(
    rows: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding_layer, "_can_pack", lambda weight: False)  # as on a CPU without them
    monkeypatch.setattr(decoding_layer, "WIDENED", 32 * 7)  # of 64 outputs 7 at a time
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, size, bias=bias).to(dtype) for size in (48, 16)]
    x = torch.randn(rows, 1, 32)
    exact = torch.cat(
        [torch.nn.functional.linear(x.double(), *(part.double() for part in one.parameters())) for one in layers], -1
    )
    found = decoding_layer.projection(*layers)(x)
    assert found.dtype == torch.float32
    few = 2**-7 if rows < decoding_layer.MANY_ROWS else 1e-6
    torch.testing.assert_close(found.double(), exact, rtol=few, atol=few)


def test_a_model_with_an_adapter_over_weights_in_bf16_decodes_as_it_computes() -> None:
    model, rows = small(kv_heads=2).bfloat16(), rows_of(LENGTHS)
    attach(model, LoraConfig(r=2, alpha=4), seed=1)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    found = torch.cat(decoded(model.eval().decoding(), rows, read=LENGTHS))
    for row in (0, 2):
        torch.testing.assert_close(
            decoded(model.decoding(), [rows[row]], read=[LENGTHS[row]])[0],
            found.view(len(LENGTHS), -1, found.shape[-1])[row],
            atol=0.1,
            rtol=0,
        )


def test_a_model_with_an_adapter_decodes_with_it() -> None:
    model, rows = small(kv_heads=2), rows_of(LENGTHS)
    plain = computed(model, rows, read=LENGTHS)
    attach(model, LoraConfig(r=2, alpha=4), seed=1)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    adapted = computed(model.eval(), rows, read=LENGTHS)
    assert (torch.cat(adapted) - torch.cat(plain)).abs().max() > 0.1
    torch.testing.assert_close(decoded(model.decoding(), rows, read=LENGTHS), adapted, atol=1e-5, rtol=1e-5)


def test_a_model_in_four_bits_decodes_in_four_bits() -> None:
    model, rows = small(kv_heads=2), rows_of(LENGTHS)
    plain = computed(model, rows, read=LENGTHS)
    quantize(model, double=False)
    quantized = computed(model, rows, read=LENGTHS)
    assert (torch.cat(quantized) - torch.cat(plain)).abs().max() > 0.01
    torch.testing.assert_close(decoded(model.decoding(), rows, read=LENGTHS), quantized, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_kept_rows_continue_unchanged_when_others_are_dropped() -> None:
    rows = rows_of(LENGTHS)
    decoding = small(kv_heads=2).decoding()
    whole = decoded(decoding, rows, read=LENGTHS)
    decoding.read([row[:size] for row, size in zip(rows, LENGTHS, strict=True)], room=8)
    decoding.step([row[size] for row, size in zip(rows, LENGTHS, strict=True)])
    decoding.keep([1, 2])
    for step in range(1, 8):
        found = decoding.step([rows[1][1 + step], rows[2][12 + step]])
        torch.testing.assert_close(found, torch.stack([whole[1][step + 1], whole[2][step + 1]]), atol=1e-5, rtol=1e-5)


def test_an_earlier_batch_in_the_cache_is_not_seen() -> None:
    model = small(kv_heads=2)
    decoding = model.decoding()
    for lengths, more in (([20, 3, 9, 14, 2], 4), ([1, 5, 2], 12), ([6] * 7, 2), ([25], 6)):
        rows = rows_of(lengths, more=more)
        torch.testing.assert_close(
            decoded(decoding, rows, read=lengths), computed(model, rows, read=lengths), atol=1e-5, rtol=1e-5
        )


@torch.inference_mode()
def test_look_ahead_leaves_the_cache_unchanged() -> None:
    model = small(kv_heads=2)
    rows, ahead = rows_of(LENGTHS, more=1), torch.tensor(texts([6] * len(LENGTHS), seed=9))
    branches = torch.tensor([[0, 0, 0, 1, 1, 2]] * len(LENGTHS))
    targets = ahead.roll(1, 1)
    decoding = model.decoding()
    prompts = [row[:-1] for row in rows]
    decoding.read(prompts, room=6)
    found = decoding.look_ahead(ahead, targets, branches)
    for prompt, tokens, wanted, likelihoods in zip(prompts, ahead.tolist(), targets.tolist(), found, strict=True):
        parts = [
            model(torch.tensor([[*prompt, *tokens[start:stop]]]))[0, start - stop :]
            for start, stop in ((0, 3), (3, 5), (5, 6))
        ]
        expected = torch.cat(parts).log_softmax(-1)[range(6), wanted].double()
        torch.testing.assert_close(likelihoods, expected, atol=1e-5, rtol=1e-5)
    after = decoding.step([row[-1] for row in rows])
    torch.testing.assert_close(after, torch.stack([model(torch.tensor([row]))[0, -1] for row in rows]), atol=1e-5, rtol=1e-5)

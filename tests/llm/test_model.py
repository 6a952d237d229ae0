"""The hand-written decoders: equal to stock Transformers in values and gradients, and blind to what they must not see."""

import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaConfig as StockConfig
from transformers import LlamaForCausalLM

from llm.attention import Visibility, attend, visibility
from llm.models import architectures
from llm.models.llama.config import LlamaConfig
from llm.models.llama.model import Llama

VOCABULARY = 61


def small(**changes: object) -> Llama:
    sizes = {"hidden_size": 48, "layers": 2, "heads": 4, "intermediate_size": 40, "context": 512}
    torch.manual_seed(0)
    return architectures()["llama"].build(LlamaConfig.model_validate(sizes | changes), vocab_size=VOCABULARY)


def stock(model: Llama) -> LlamaForCausalLM:
    config = model.config
    twin = LlamaForCausalLM(
        StockConfig(
            vocab_size=model.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=config.tied,
            attention_dropout=0.0,
        )
    )
    twin.load_state_dict(model.state_dict())
    return twin


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


# Lengths around the 128 queries of an attention block, and odd ones.
SHAPES = [*itertools.product([1, 2, 4], [True, False], [7, 129]), (2, True, 300)]


@pytest.mark.parametrize(("shared_by", "tied", "length"), SHAPES)
def test_logits_and_gradients_equal_those_of_transformers(shared_by: int, tied: bool, length: int) -> None:
    model = small(kv_heads=4 // shared_by, tied=tied)
    twin = stock(model)
    inputs = tokens(2, length)
    ours, theirs = model(inputs), twin(inputs).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for logits in (ours, theirs):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten()).backward()
    expected = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weight.grad, expected[name].grad, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_head_size_need_not_follow_from_the_hidden_size(head_size: int) -> None:
    model = small(head_size=head_size, kv_heads=2)
    inputs = tokens(1, 33)
    torch.testing.assert_close(model(inputs), stock(model)(inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [40, 200])
def test_no_position_sees_the_future(length: int) -> None:
    model = small()
    inputs = tokens(1, length)
    before = model(inputs)
    for position in (0, length // 2, length - 1):
        changed = inputs.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCABULARY
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=0, rtol=0)
        assert not torch.equal(after[:, position:], before[:, position:])


def packed(lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """`documents` and `positions` of rows that hold documents of these lengths."""
    documents = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in lengths])
    positions = torch.tensor([[i for n in row for i in range(n)] for row in lengths])
    return documents, positions


@pytest.mark.parametrize("lengths", [[[10, 20, 5], [35], [1, 34]], [[100, 130, 70], [150, 149, 1], [299, 1]]])
def test_a_document_in_a_row_is_computed_as_if_alone(lengths: list[list[int]]) -> None:
    model = small(kv_heads=2)
    documents, positions = packed(
        [row if sum(row) == sum(lengths[0]) else [*row, sum(lengths[0]) - sum(row)] for row in lengths]
    )
    inputs = tokens(len(lengths), documents.shape[1])
    together = model(inputs, documents=documents, positions=positions)
    for row in range(len(lengths)):
        for document in documents[row].unique():
            of_it = documents[row] == document
            alone = model(inputs[row, of_it][None])[0]
            torch.testing.assert_close(together[row, of_it], alone, atol=1e-5, rtol=1e-5)


def test_gradients_do_not_cross_documents() -> None:
    model = small()
    documents, positions = packed([[120, 130, 50]])
    inputs = tokens(1, 300)
    seen: list[Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda *found: seen.append(found[2]) or found[2].retain_grad())
    model(inputs, documents=documents, positions=positions)[0, 130:250].square().sum().backward()
    reached = seen[0].grad[0].abs().sum(-1) > 0
    assert reached[120:250].all() and not reached[:120].any() and not reached[250:].any()


def test_padding_changes_nothing_before_it() -> None:
    model = small()
    inputs = tokens(1, 20)
    padded = torch.nn.functional.pad(inputs, (0, 12))
    documents = torch.tensor([[0] * 20 + [-1] * 12])
    positions = torch.tensor([[*range(20), *range(12)]])
    found = model(padded, documents=documents, positions=positions)
    torch.testing.assert_close(found[:, :20], model(inputs), atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cached_decoding_equals_the_whole_row(kv_heads: int) -> None:
    model = small(kv_heads=kv_heads).eval()
    inputs = tokens(3, 24)
    cache = model.new_cache(3, 24)
    with torch.no_grad():
        whole = model(inputs)
        parts = [model(inputs[:, :9], positions=torch.arange(9).expand(3, -1), cache=cache)]
        parts += [model(inputs[:, i : i + 1], positions=torch.full((3, 1), i), cache=cache) for i in range(9, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_prompts_of_different_lengths_share_a_cache(left: bool) -> None:
    model = small(kv_heads=2).eval()
    lengths = [3, 8, 5]
    prompts = [tokens(1, 8)[0, :n] for n in lengths]
    batch, positions = torch.zeros(3, 8, dtype=torch.int64), torch.full((3, 8), -1)
    for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        place = slice(8 - n, 8) if left else slice(0, n)
        batch[row, place], positions[row, place] = prompt, torch.arange(n)
    cache = model.new_cache(3, 12)
    step = tokens(3, 1)
    with torch.no_grad():
        model(batch, positions=positions, cache=cache)
        found = model(step, positions=torch.tensor(lengths)[:, None], cache=cache)
        for row in range(3):
            alone = model(torch.cat([prompts[row], step[row]])[None])
            torch.testing.assert_close(found[row, 0], alone[0, -1], atol=1e-5, rtol=1e-5)


def test_recomputing_layers_gives_the_same_gradients() -> None:
    inputs = tokens(2, 30)
    gradients = []
    for recompute in (False, True):
        model = small().train()
        model.recompute = recompute
        model(inputs).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again, atol=0, rtol=0)


def test_fresh_weights_are_xavier_uniform_and_norms_are_one() -> None:
    model = small(tied=False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all()
        else:
            bound = math.sqrt(6 / sum(weight.shape))  # Glorot and Bengio 2010, equation 16
            assert weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name


def test_scaled_initialization_shrinks_only_what_writes_into_the_residual_stream() -> None:
    plain, scaled = dict(small().named_parameters()), dict(small(init="scaled").named_parameters())
    for name, weight in scaled.items():
        factor = 1 / math.sqrt(2 * 2) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(weight, plain[name] * factor)


def test_happy_llms_preset_has_215_million_parameters() -> None:
    config = LlamaConfig.model_validate({"preset": "happy-llm-215m"})
    with torch.device("meta"):
        model = architectures()["llama"].build(config, vocab_size=6144)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(215e6, rel=0.005)


def test_a_preset_is_the_same_as_its_sizes_written_out() -> None:
    written = LlamaConfig.model_validate({"hidden_size": 192, "layers": 4, "heads": 6, "kv_heads": 6, "head_size": 32})
    assert LlamaConfig.model_validate({"preset": "2m"}) == written
    assert LlamaConfig.model_validate({"preset": "2m", "layers": 5}).layers == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 100, "heads": 3}, "hidden_size wants a multiple of heads; found hidden_size 100 and heads 3"),
        ({"heads": 6, "kv_heads": 4}, "kv_heads wants a divisor of heads; found heads 6 and kv_heads 4"),
        ({"head_size": 7}, "head_size wants an even number"),
        ({"preset": "big"}, "preset wants one of .*happy-llm-215m; found 'big'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.model_validate({"hidden_size": 48, "layers": 1, "heads": 4} | wrong)


def test_attention_under_a_mask_equals_attention_by_blocks() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 20])
    blocks = visibility(20, documents=documents, dtype=q.dtype, device=torch.device("cpu"))
    masked = Visibility(None, (documents[:, :, None] == documents[:, None, :]).tril()[:, None])  # as on a GPU
    torch.testing.assert_close(attend(q, k, v, visible=masked), attend(q, k, v, visible=blocks))


@pytest.mark.parametrize(
    "wrong", [{"preset": ["2m"]}, {"preset": 3}, {"preset": "3m"}, {"preset": "2m", "rope_base": math.inf}]
)
def test_a_wrong_preset_or_number_is_a_fault_of_the_recipe(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"preset wants one of 2m, .*found|rope_base\n.*finite"):
        LlamaConfig.model_validate(wrong)

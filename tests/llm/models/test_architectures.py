"""The decoder computes what stock Transformers does, however it is trained and decoded: many sizes of one family.

`test_families` has one size of every family, and every option. Weights are drawn here, also those of norms, which are 1 in a
fresh model. Letters: B rows, T positions, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from tiny_training import VOCABULARY, MadeUpRows, tiny_training
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm.adapters import lora
from llm.data.batch import IGNORE, Batch, collate
from llm.layers.dropout import Dropout, set_counters
from llm.models import architectures
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.models.decoder.model import Decoder
from llm.tokenizer.train_bpe import train_bpe
from llm.training.config import Budget
from llm.training.loss import Learner, next_token_loss

pytestmark = pytest.mark.parametrize("name", ["llama"])

CONTEXT = 257
LENGTHS = [1, 7, 33, 129, CONTEXT]  # around the 128 queries of a block of attention, and odd ones
GROUPED = pytest.mark.parametrize("shared_by", [1, 2, 4])  # query heads to a key head
TIED = pytest.mark.parametrize("tied", [True, False])
HEAD_SIZES = pytest.mark.parametrize("head_size", [32, 64, 96, 128])
# Documents of rows of CONTEXT positions: inside a block, across its border, of one position, padding (the last, where < 0).
PACKED = [[1, 7, 33, 129, 87], [128, 129], [257], [100, 1, 1, 140, -15], [3, 150, 104]]


def small(name: str, **changes: Any) -> Decoder:
    """A model of two layers, its weights drawn so that every part matters: logits and scores of attention are about 1."""
    sizes = {"hidden_size": 48, "layers": 2, "heads": 4, "head_size": 32, "intermediate_size": 40, "context": CONTEXT}
    unusual = {"rope_base": 5000.0, "norm_eps": 1e-4}
    architecture = architectures()[name]
    model = architecture.build(architecture.config(sizes | unusual | changes), vocab_size=VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.data.normal_(std=1 / math.sqrt(weight.shape[1]), generator=generator)
    return model.eval()


def stock(model: Decoder) -> PreTrainedModel:
    """Transformers' own model of this type, with the same weights."""
    architecture = architectures()[model.config.name]
    fields = architecture.to_transformers(model.config)
    twin = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields, vocab_size=model.vocab_size)
    )
    twin.load_state_dict(model.state_dict())
    assert twin.config.model_type == architecture.model_type
    return twin.eval()


@cache
def pair(name: str, shared_by: int, tied: bool, head_size: int) -> tuple[Decoder, PreTrainedModel]:
    """A model and its stock twin; gradients are the only thing that tests leave in them."""
    model = small(name, kv_heads=4 // shared_by, tied=tied, head_size=head_size)
    return model, stock(model)


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))


def packed(lengths: list[list[int]]) -> Batch:
    """Rows of documents of these lengths, a negative one being padding; a target is the token that follows in its document."""
    documents = torch.tensor([[d if n > 0 else -1 for d, n in enumerate(row) for _ in range(abs(n))] for row in lengths])
    positions = torch.tensor([[i for n in row for i in range(abs(n))] for row in lengths])
    inputs = tokens(*documents.shape)
    targets = torch.full_like(inputs, IGNORE)
    follows = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    targets[:, :-1][follows] = inputs[:, 1:][follows]
    return Batch(inputs, targets, documents, positions, torch.arange(len(inputs)))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` for every weight."""
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


# Transformers' own two ways of attention, "sdpa" and "eager", differ on these models by up to 7e-6 in the logits, which are
# about 1, and by 1.5e-6 of the norm of a weight's gradient; either is as far from its own result in fp64.
LOGITS = {"atol": 5e-5, "rtol": 0.0}
GRADIENT = 1e-5  # of the norm


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # Where attention has one position to choose from, queries and keys have the gradient 0, and Transformers finds 1e-6.
        assert (found[name] - gradient).norm() <= GRADIENT * gradient.norm() + 3e-6, name


@GROUPED
@TIED
@HEAD_SIZES
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_and_gradients_equal_those_of_transformers(
    name: str, shared_by: int, tied: bool, head_size: int, length: int
) -> None:
    model, twin = pair(name, shared_by, tied, head_size)
    inputs, targets = tokens(2, length), tokens(2, length + 1)[:, 1:]
    ours, theirs = model(inputs), twin(inputs).logits
    torch.testing.assert_close(ours, theirs, **LOGITS)
    losses = [cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in (ours, theirs)]
    assert_same_gradients(gradients(model, losses[0]), gradients(twin, losses[1]))


def documents_of(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Row and columns of each document of `batch`."""
    for row, documents in enumerate(batch.documents):
        for document in documents[documents >= 0].unique():
            yield torch.tensor(row), (documents == document).nonzero()[:, 0]


@GROUPED
@TIED
@HEAD_SIZES
def test_documents_packed_in_rows_equal_transformers_on_each_alone(
    name: str, shared_by: int, tied: bool, head_size: int
) -> None:
    model, twin = pair(name, shared_by, tied, head_size)
    batch = packed(PACKED)
    together = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    assert together.isfinite().all()
    loss = torch.zeros(())
    for row, columns in documents_of(batch):
        alone = twin(batch.tokens[row, columns][None]).logits[0]
        torch.testing.assert_close(together[row, columns], alone, **LOGITS)
        loss = loss + cross_entropy(alone, batch.targets[row, columns], ignore_index=IGNORE, reduction="sum")
    ours, count = Learner(model, next_token_loss, precision="fp32")(batch)
    assert count == (batch.targets != IGNORE).sum()
    torch.testing.assert_close(ours, loss, atol=0, rtol=1e-6)
    assert_same_gradients(gradients(model, ours / count), gradients(twin, loss / count))


SEEN = pytest.mark.parametrize("lengths", [PACKED, [[3, 4], [7]]])


@GROUPED
@SEEN
def test_a_token_changes_what_follows_in_its_document_and_not_one_bit_elsewhere(
    name: str, shared_by: int, lengths: list[list[int]]
) -> None:
    model, batch = small(name, kv_heads=4 // shared_by), packed(lengths)
    rows, length = batch.tokens.shape
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model(batch.tokens, documents=batch.documents, positions=batch.positions)
        for position in torch.randint(length, (6, rows), generator=random):  # another one in each row
            changed = batch.tokens.clone()
            changed[range(rows), position] = (changed[range(rows), position] + 1) % VOCABULARY
            after = model(changed, documents=batch.documents, positions=batch.positions)
            same = batch.documents == batch.documents[range(rows), position][:, None]
            sees = same & (torch.arange(length) >= position[:, None])
            assert torch.equal((after != before).any(-1), sees)


@GROUPED
@SEEN
def test_a_position_has_a_gradient_from_what_precedes_in_its_document_and_exactly_none_from_elsewhere(
    name: str, shared_by: int, lengths: list[list[int]]
) -> None:
    model, batch = small(name, kv_heads=4 // shared_by), packed(lengths)
    rows, length = batch.tokens.shape
    embedded: list[Tensor] = []
    (embedding,) = (module for module in model.modules() if isinstance(module, nn.Embedding))
    embedding.register_forward_hook(lambda *found: embedded.append(found[2]))
    logits = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    random = torch.Generator().manual_seed(0)
    for position in torch.randint(length, (6, rows), generator=random):
        (found,) = torch.autograd.grad(logits[range(rows), position].square().sum(), embedded[0], retain_graph=True)
        same = batch.documents == batch.documents[range(rows), position][:, None]
        seen = same & (torch.arange(length) <= position[:, None])
        assert torch.equal((found != 0).any(-1), seen)


def test_padding_changes_nothing_before_it(name: str) -> None:
    model = small(name)
    batch = packed([[100, 1, 1, 140, -15]])
    cut = [part[:, :-15] for part in (batch.tokens, batch.documents, batch.positions)]
    found = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    torch.testing.assert_close(found[:, :-15], model(cut[0], documents=cut[1], positions=cut[2]), **LOGITS)


@GROUPED
@HEAD_SIZES
@pytest.mark.parametrize(("read", "steps"), [(1, 11), (9, 3), (130, 2)])
@torch.inference_mode()
def test_cached_decoding_equals_the_whole_forward_pass(
    name: str, shared_by: int, head_size: int, read: int, steps: int
) -> None:
    model, _ = pair(name, shared_by, True, head_size)
    inputs, decoding = tokens(3, read + steps), model.decoding()
    found = [decoding.read(inputs[:, :read].tolist(), room=steps)]
    found += [decoding.step(inputs[:, place].tolist()) for place in range(read, read + steps)]
    torch.testing.assert_close(torch.stack(found, 1), model(inputs)[:, read - 1 :], **LOGITS)


@GROUPED
@torch.inference_mode()
def test_prompts_of_different_lengths_share_a_cache(name: str, shared_by: int) -> None:
    model, _ = pair(name, shared_by, True, 32)
    prompts = [tokens(1, 8)[0, :length] for length in (3, 8, 5)]
    step, decoding = tokens(3, 1), model.decoding()
    decoding.read([prompt.tolist() for prompt in prompts], room=1)
    found = decoding.step(step[:, 0].tolist())
    for row in range(3):
        alone = model(torch.cat([prompts[row], step[row]])[None])
        torch.testing.assert_close(found[row], alone[0, -1], **LOGITS)


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What goes into each site of dropout and comes out, in the order in which they act."""
    found: list[tuple[Tensor, Tensor]] = []
    sites = [module for module in model.modules() if isinstance(module, Dropout)]
    hooks = [site.register_forward_hook(lambda _, given, out: found.append((given[0], out))) for site in sites]
    yield found
    for hook in hooks:
        hook.remove()


def farthest(share: float, draws: int, *, tests: int) -> float:
    """How far the mean of `draws` may be from `share`: one of `tests` means is farther once in a million trials."""
    return NormalDist().inv_cdf(1 - 1e-6 / (2 * tests)) * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
@torch.no_grad()
def test_dropout_has_the_right_rate_and_scale_at_every_site(name: str, rate: float) -> None:
    model = small(name, dropout=rate).train()
    set_counters(model, seed=1, step=2, rows=torch.arange(12))
    with watched(model) as sites:
        model(tokens(12, CONTEXT))
    assert len(sites) == 1 + 2 * model.config.layers  # the embedding, and both branches of each layer
    masks = []
    for given, out in sites:
        kept = out != 0
        torch.testing.assert_close(out, given * kept / (1 - rate), atol=0, rtol=1e-6)
        dropped = (~kept).double()
        for over in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):  # all; of each channel, position and row
            share = dropped.mean(over)
            assert (share - rate).abs().max() < farthest(rate, dropped.numel() // share.numel(), tests=share.numel())
        masks.append(kept)
    overall = 1 - torch.stack(masks).double().mean()
    assert abs(overall - rate) < farthest(rate, len(masks) * masks[0].numel(), tests=1)
    alike = rate**2 + (1 - rate) ** 2  # how often two independent masks agree
    pairs = list(combinations(masks, 2))
    for one, other in pairs:
        assert abs((one == other).double().mean().item() - alike) < farthest(alike, one.numel(), tests=len(pairs))


@torch.no_grad()
def test_dropout_acts_only_in_training(name: str) -> None:
    dropped, plain = small(name, dropout=0.5), small(name)
    inputs = tokens(2, 9)
    assert torch.equal(dropped(inputs), plain(inputs))
    set_counters(dropped.train(), seed=0, step=0, rows=torch.arange(2))
    assert not torch.allclose(dropped(inputs), plain(inputs))


LAYOUTS = {
    "micro-batches": [[0, 1, 2], [3, 4], [5]],
    "rows alone": [[0], [1], [2], [3], [4], [5]],
    "two processes": [[0, 2, 4], [1, 3, 5]],
    "another order": [[4, 0, 5, 3, 1, 2]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_does_not_depend_on_layout(name: str, layout: str) -> None:
    model = small(name, dropout=0.2).train()
    learner = Learner(model, next_token_loss, precision="fp32")
    rows = MadeUpRows()

    def masks_and_gradients(chosen: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
        set_counters(model, seed=3, step=7, rows=torch.tensor(chosen))
        with watched(model) as sites:
            loss, _ = learner(collate([rows.row(index) for index in chosen], chosen))
        return [out != 0 for _, out in sites], gradients(model, loss)

    whole, wanted = masks_and_gradients([0, 1, 2, 3, 4, 5])
    total = {weight: torch.zeros_like(gradient) for weight, gradient in wanted.items()}
    for part in LAYOUTS[layout]:
        found, added = masks_and_gradients(part)
        assert all(torch.equal(mask, expected[part]) for mask, expected in zip(found, whole, strict=True))
        for weight, gradient in added.items():
            total[weight] += gradient
    assert_same_gradients(total, wanted)


def test_recomputed_layers_give_the_same_gradients(name: str) -> None:
    model = small(name, dropout=0.1).train()
    set_counters(model, seed=0, step=0, rows=torch.arange(2))
    found = []
    for model.recompute in (False, True):
        found.append(gradients(model, model(tokens(2, 150)).square().mean()))
    assert all(torch.equal(found[1][weight], gradient) for weight, gradient in found[0].items())


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_accumulation_and_micro_batch_do_not_change_the_update(name: str, tmp_path: Path, micro_batch: int) -> None:
    start, whole, parts = (small(name, dropout=0.1) for _ in range(3))
    settings = {"batch_tokens": 5 * MadeUpRows().context, "budget": Budget(steps=2), "validation": None}
    tiny_training(whole, tmp_path / "whole", micro_batch=5, **settings)
    tiny_training(parts, tmp_path / "parts", micro_batch=micro_batch, **settings)
    first, wanted, found = (dict(model.named_parameters()) for model in (start, whole, parts))
    for weight, before in first.items():
        update = wanted[weight] - before
        assert (found[weight] - wanted[weight]).norm() < 1e-4 * update.norm(), weight


@GROUPED
@TIED
def test_bf16_stays_near_fp32(name: str, shared_by: int, tied: bool) -> None:
    model, _ = pair(name, shared_by, tied, 64)
    batch = packed(PACKED)
    losses, found = [], []
    for precision in ("fp32", "bf16"):
        total, count = Learner(model, next_token_loss, precision=precision)(batch)
        losses.append((total / count).item())
        found.append(gradients(model, total / count))
    assert losses[1] != losses[0]  # it is computed in bf16
    assert losses[1] == pytest.approx(losses[0], rel=2**-9)  # the rounding of one number in bf16
    for weight, exact in found[0].items():
        assert found[1][weight].dtype == torch.float32
        assert cosine_similarity(found[1][weight].flatten(), exact.flatten(), dim=0) > 0.99, weight


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["heart and liver"], 300, min_frequency=2, pre_tokenizer_name="gpt-2", allow_smaller=True).save(folder)
    return folder


@GROUPED
@TIED
@HEAD_SIZES
def test_a_model_survives_a_round_trip_through_transformers(
    name: str, shared_by: int, tied: bool, head_size: int, tokenizer: Path, tmp_path: Path
) -> None:
    model, _ = pair(name, shared_by, tied, head_size)
    save_checkpoint(tmp_path / "ours", model, tokenizer)
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stock.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        opened = load_checkpoint(tmp_path / folder)
        assert type(opened) is type(model)
        assert (opened.config, opened.vocab_size) == (model.config, model.vocab_size)
        weights, wanted = opened.state_dict(), model.state_dict()
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[weight], tensor) for weight, tensor in wanted.items())
        assert len(list(opened.parameters())) == len(list(model.parameters()))  # a tied head is tied again


def test_every_linear_layer_can_have_an_adapter(name: str) -> None:
    model = small(name, tied=False)
    linear = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)]
    lora.attach(model, lora.LoraConfig(r=2, alpha=2, target_modules=linear), seed=0)
    assert [layer for layer, _ in lora.adapted_layers(model)] == linear
    learned = {weight for weight, tensor in model.named_parameters() if tensor.requires_grad}
    assert learned == {f"{layer}.lora_{factor}.default.weight" for layer in linear for factor in "AB"}
    model(tokens(1, 5)).sum().backward()
    assert all(tensor.grad is not None for tensor in model.parameters() if tensor.requires_grad)

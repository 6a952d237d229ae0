"""Every family, with every option that it may have, computes what stock Transformers does, and is read and written alike.

`tiny_families` has the cases; a registered family is one without further entry.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_families import CASES, CONTEXT, SIZES, VOCABULARY, config_of, drawn, pair, stock_of, tokens
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from llm.adapters.frozen import hold_once
from llm.adapters.lora import LoraConfig, adapted_layers, attach, copy_dequantized, quantize, save_adapter
from llm.errors import InputError
from llm.models import architectures, from_transformers
from llm.models.checkpoint import load_checkpoint, save_checkpoint
from llm.models.decoder.config import DecoderConfig, flops_per_token, parameter_count
from llm.models.families import families
from llm.tokenizer.train_bpe import train_bpe
from runner.graph import plain

every_case = pytest.mark.parametrize("case", CASES)
EQUAL = {"atol": 1e-4, "rtol": 0.0}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


@every_case
def test_logits_and_gradients_equal_those_of_transformers(case: str) -> None:
    model, twin = pair(case)
    inputs, targets = tokens(2, CONTEXT), tokens(2, CONTEXT + 1)[:, 1:]
    found = [(net, logits) for net, logits in ((model, model(inputs)), (twin, twin(inputs).logits))]
    torch.testing.assert_close(found[0][1], found[1][1], **EQUAL)
    ours, theirs = (gradients(net, cross_entropy(logits.flatten(0, 1), targets.flatten())) for net, logits in found)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@every_case
def test_rows_of_other_lengths_equal_those_of_transformers(case: str) -> None:
    model, twin = pair(case)
    with torch.no_grad():
        for length in (1, 8, 15, 17):  # below a window of 9 and an original context of 16, and above
            torch.testing.assert_close(model(tokens(1, length)), twin(tokens(1, length)).logits, **EQUAL)


@every_case
@torch.no_grad()
def test_bf16_is_at_most_twice_as_far_from_fp32_as_transformers_is(case: str) -> None:
    model, twin = pair(case)
    inputs = tokens(2, CONTEXT)
    exact = twin(inputs).logits
    stock = copy.deepcopy(twin).bfloat16()
    stock.model.rotary_emb.load_state_dict(twin.model.rotary_emb.state_dict())
    theirs = (stock(inputs).logits.float() - exact).norm()
    with torch.autocast("cpu", torch.bfloat16):
        ours = (model(inputs).float() - exact).norm()
    held = (copy.deepcopy(model).bfloat16()(inputs).float() - exact).norm()
    assert 0 < ours < 2 * theirs
    assert 0 < held < 2 * theirs


@every_case
@torch.no_grad()
def test_documents_packed_in_a_row_equal_transformers_on_each_alone(case: str) -> None:
    model, twin = pair(case)
    lengths = [[20, 1, 43], [64], [13, 17, 34]]
    documents = torch.tensor([[place for place, size in enumerate(row) for _ in range(size)] for row in lengths])
    positions = torch.tensor([[place for size in row for place in range(size)] for row in lengths])
    inputs = tokens(3, CONTEXT)
    together = model(inputs, documents=documents, positions=positions)
    for row, sizes in enumerate(lengths):
        for document in range(len(sizes)):
            columns = documents[row] == document
            torch.testing.assert_close(together[row, columns], twin(inputs[row, columns][None]).logits[0], **EQUAL)


@every_case
@torch.inference_mode()
def test_cached_decoding_equals_the_whole_forward_pass(case: str) -> None:
    model, _ = pair(case)
    inputs, lengths = tokens(3, CONTEXT), [40, 20, 33]
    decoding = model.decoding()
    found = [decoding.read([row[:size].tolist() for row, size in zip(inputs, lengths, strict=True)], room=24)]
    found += [decoding.step([int(row[size + step]) for row, size in zip(inputs, lengths, strict=True)]) for step in range(24)]
    for row, size in enumerate(lengths):
        wanted = model(inputs[row : row + 1, : size + 24])[0, size - 1 :]
        torch.testing.assert_close(torch.stack([logits[row] for logits in found]), wanted, **EQUAL)


@every_case
@torch.inference_mode()
def test_branches_after_a_prompt_equal_the_whole_forward_pass(case: str) -> None:
    model, _ = pair(case)
    prompts, ahead = [tokens(1, size)[0] for size in (20, 26)], tokens(2, 14)
    branches = torch.tensor([[0] * 12 + [1] * 2] * 2)
    targets, decoding = ahead.roll(1, 1), model.decoding()
    decoding.read([prompt.tolist() for prompt in prompts], room=14)
    found = decoding.look_ahead(ahead, targets, branches)
    for row, prompt in enumerate(prompts):
        for begin, end in ((0, 12), (12, 14)):
            whole = model(torch.cat([prompt, ahead[row, begin:end]])[None])[0, len(prompt) :].log_softmax(-1)
            wanted = whole.gather(1, targets[row, begin:end, None])[:, 0].double()
            torch.testing.assert_close(found[row, begin:end], wanted, **EQUAL)


@every_case
@torch.inference_mode()
@pytest.mark.usefixtures("compiled_code")
def test_the_kernel_for_a_step_equals_the_whole_forward_pass(case: str) -> None:
    model, _ = pair(case)
    decoding, row = model.decoding(), tokens(1, CONTEXT)[0]
    decoding.compile()
    found = [decoding.read([row[:30].tolist()], room=CONTEXT - 30)]
    found += [decoding.step([int(token)]) for token in row[30:]]
    torch.testing.assert_close(torch.cat(found), model(row[None])[0, 29:], **EQUAL)


@every_case
def test_recomputed_layers_give_the_same_gradients(case: str) -> None:
    model = copy.deepcopy(pair(case)[0]).train()
    found = []
    for model.recompute in (False, True):
        found.append(gradients(model, model(tokens(1, 40)).square().mean()))
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@every_case
def test_planning_knows_the_parameters_and_operations_of_the_model(case: str) -> None:
    model = pair(case)[0]
    assert parameter_count(model.config, vocab_size=VOCABULARY) == sum(weight.numel() for weight in model.parameters())
    operations = flops_per_token(model.config, vocab_size=VOCABULARY, context=CONTEXT)
    assert operations == model.flops_per_token(CONTEXT)
    matrices = sum(w.numel() for n, w in model.named_parameters() if w.dim() == 2 and "embed" not in n)
    matrices += VOCABULARY * SIZES["hidden_size"] * model.config.tied
    seen = torch.zeros(CONTEXT, CONTEXT)
    for kind in model.config.kinds:
        seen += (
            torch.ones(CONTEXT, CONTEXT).tril().triu(-CONTEXT if kind != "window" else 1 - (model.config.parts.window or 0))
        )
    visible = float(seen.sum()) / CONTEXT - len(model.config.kinds) / 2  # a position counts as half of its own
    products = 12 * model.config.heads * model.config.head_size * visible
    assert operations == pytest.approx(6 * matrices + products, rel=0.01)


@every_case
def test_a_configuration_survives_config_json_and_a_recipe(case: str) -> None:
    config = config_of(case)
    fields = json.loads(json.dumps(architectures()[config.name].to_transformers(config)))
    assert from_transformers(fields, dropout=0.0) == config
    assert DecoderConfig.model_validate(plain(config)) == config


# Fields of a config.json that change nothing that is computed here.
WITHOUT_EFFECT = {
    "vocab_size",  # read beside the weights
    "pretraining_tp",
    "max_window_layers",  # layer_types say it
    "_sliding_window_pattern",
    "no_rope_layer_interval",  # no_rope_layers say it
    "resid_pdrop",
    "embd_pdrop",
    "attention_dropout",
}


@pytest.mark.parametrize("name", architectures())
def test_every_field_of_transformers_configuration_is_read_or_refused(name: str) -> None:
    family, config = families()[name], DecoderConfig.model_validate({"name": name} | SIZES)
    stock = AutoConfig.for_model(name, num_hidden_layers=2).to_dict()
    known = {*family.to_transformers(config), *family.fixed, *family.unset, *PreTrainedConfig().to_dict(), *WITHOUT_EFFECT}
    assert not {field for field in stock if field not in known and not field.endswith("_token_id")}


@pytest.mark.parametrize("name", architectures())
def test_fields_that_config_json_leaves_out_have_transformers_defaults(name: str) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 64}
    stock = AutoConfig.for_model(name, **sizes).to_dict()
    found = architectures()[name].to_transformers(from_transformers({"model_type": name, **sizes}, dropout=0.0))
    read, whole = (from_transformers(fields, dropout=0.0) for fields in (found, stock))
    assert (read.rope_base, read.rope_scaling, read.options) == (whole.rope_base, whole.rope_scaling, whole.options)
    for field in found.keys() & stock.keys() - {"architectures", "attention_dropout", "initializer_range", "rope_parameters"}:
        if stock[field] is not None and (field != "sliding_window" or found[field] is not None):
            assert found[field] == stock[field], field


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("llama", {"qk_norm": "head"}, "options.*qk_norm: expected 'none', as every llama has it, got 'head'"),
        ("llama", {"attention_bias": "qkv"}, 'attention_bias: expected "none" or "all"'),
        ("qwen2", {"attention_bias": "none"}, "attention_bias: expected 'qkv', as every qwen2 has it, got 'none'"),
        ("qwen3", {"pattern": ["unrotated"]}, 'pattern: expected "full" and "window"'),
        ("qwen3", {"pattern": ["window"]}, "window: expected a number of positions"),
        ("mistral", {"pattern": ["full", "window"], "window": 9}, "pattern: expected"),
        ("smollm3", {"pattern": ["window"], "window": 9}, "pattern: expected"),
        ("granite", {"embedding_scale": "sqrt"}, "embedding_scale: expected a number"),
        ("phi3", {"fused": "none"}, "fused: expected 'all', as every phi3 has it, got 'none'"),
        ("olmo2", {"norms": "before"}, "norms: expected 'after'"),
        ("glm4", {"attention_bias": "all"}, 'attention_bias: expected "qkv" or "none", as in a config.json of glm4'),
        ("glm", {"norms": "around"}, "norms: expected 'before', as every glm has it"),
        ("olmo3", {"window_rope_base": None}, "window_rope_base: expected a number, as in a config.json of olmo3"),
        ("ministral3", {"query_growth": 0.1}, "rope_scaling: expected one of kind yarn beside a query_growth"),
        ("gemma3_text", {"attention_scale": 0.3}, "attention_scale: expected 1 / sqrt"),
        ("gemma3_text", {"final_softcap": 30.0}, "final_softcap: expected 0.0"),
    ],
)
def test_an_option_that_config_json_cannot_say_is_refused_by_its_name(name: str, options: Any, complaint: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){complaint}"):
        DecoderConfig.model_validate({"name": name, "options": options} | SIZES)


def test_an_option_that_is_the_familys_own_is_the_same_as_none() -> None:
    sizes = {"name": "gemma3_text"} | SIZES
    assert DecoderConfig.model_validate(sizes | {"options": {"gate": "gelu", "pattern": ["window"]}}).options is None
    assert DecoderConfig.model_validate(sizes) == DecoderConfig.model_validate(sizes | {"options": {"window": 512}})


@pytest.mark.parametrize(
    ("case", "fields", "complaint"),
    [
        ("qwen2", {"model_type": "qwen2_moe"}, "model_type: expected .*'qwen2'.*got 'qwen2_moe'"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: expected nothing"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "linear_attention"], "use_sliding_window": True},
            "layer_types: expected",
        ),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: expected nothing, got 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: expected False"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation: expected 'gelu_pytorch_tanh', got 'gelu'"),
        ("phi3", {"rope_scaling": {"type": "llama3"}}, "rope_scaling.type: expected 'default' or 'longrope'"),
        ("phi3 with longrope", {"rope_parameters": {"rope_type": "longrope"}}, "short_divisors: expected"),
        ("glm4", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type: expected 'default', got 'yarn'"),
        (
            "olmo3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "rope_parameters.sliding_attention.rope_type: expected 'default'",
        ),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window: expected False"),
        ("granite", {"attention_multiplier": -1.0}, "attention_scale: expected greater than 0"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_field(case: str, fields: dict[str, Any], complaint: str) -> None:
    config = config_of(case)
    with pytest.raises(InputError, match=complaint):
        from_transformers(architectures()[config.name].to_transformers(config) | fields, dropout=0.0)


def test_models_with_a_gelu_are_not_exact_in_llama_cpp_which_reads_it_from_a_table_in_fp16() -> None:
    """Gemma-3-270m in f32: log-probabilities differ by up to 0.1, and 0.3% of the probability moves (2026-11, xllamacpp)."""
    exact = {case for case in CASES if pair(case)[0].exact_in_llama_cpp}
    assert exact == {case for case in CASES if not case.startswith("gemma")}


def test_a_window_that_is_written_but_switched_off_is_none() -> None:
    """As in every Qwen2.5; the first Phi-3 calls its scaling "su"."""
    fields = architectures()["qwen2"].to_transformers(config_of("qwen2"))
    del fields["layer_types"]
    off = fields | {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 1}
    assert from_transformers(off, dropout=0.0) == config_of("qwen2")
    on = from_transformers(off | {"use_sliding_window": True, "sliding_window": 9}, dropout=0.0)
    assert on.kinds == ("full", "window") and on.parts.window == 9
    config = config_of("phi3 with longrope")
    fields = architectures()["phi3"].to_transformers(config)
    rope = fields.pop("rope_parameters")
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": {name: rope[name] for name in ("short_factor", "long_factor")}}
    for name in ("su", "yarn", "longrope"):
        assert (
            from_transformers(fields | {**older, "rope_scaling": older["rope_scaling"] | {"type": name}}, dropout=0.0)
            == config
        )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["heart and liver"], 300, min_frequency=2, pre_tokenizer_name="gpt-2", allow_smaller=True).save(folder)
    return folder


@every_case
def test_a_model_survives_a_round_trip_through_transformers(case: str, tokenizer: Path, tmp_path: Path) -> None:
    model = drawn(config_of(case), vocab_size=320)  # the tokenizer has fewer tokens: rows of the embedding are unused
    save_checkpoint(tmp_path / "ours", model, tokenizer)
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock) is type(stock_of(model))
    stock.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        opened = load_checkpoint(tmp_path / folder)
        assert (opened.config, opened.vocab_size) == (model.config, 320)
        weights, wanted = opened.state_dict(), model.state_dict()
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items())
        assert (opened.lm_head.weight is opened.embedding.weight) == model.config.tied


@every_case
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks Transformers for it
def test_an_adapter_opens_in_stock_peft(case: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, twin = copy.deepcopy(pair(case))
    plain_logits = model(tokens(1, 20))
    attach(model, LoraConfig(r=2, alpha=4), seed=1)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    model(tokens(1, 20)).square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    save_adapter(tmp_path, model)
    stock: Any = PeftModel.from_pretrained(twin, str(tmp_path))
    with torch.no_grad():
        ours = model.eval()(tokens(1, 20))
        assert (ours - plain_logits).abs().max() > 0.1 * plain_logits.abs().max()
        torch.testing.assert_close(ours, stock(tokens(1, 20)).logits, **EQUAL)


@every_case
@torch.no_grad()
def test_a_base_in_four_bits_computes_and_decodes_as_its_dequantized_weights_do(case: str) -> None:
    model, dequantized = copy.deepcopy(pair(case)[0]), copy.deepcopy(pair(case)[0])
    quantize(model, double=False)
    copy_dequantized(model, dequantized)
    inputs = tokens(1, 20)
    wanted = dequantized(inputs)
    assert (wanted - pair(case)[0](inputs)).abs().max() > 0.01
    torch.testing.assert_close(model(inputs), wanted, **EQUAL)
    with torch.inference_mode():
        torch.testing.assert_close(model.decoding().read(inputs.tolist(), room=1), wanted[:, -1], **EQUAL)


@every_case
def test_a_frozen_base_in_bf16_learns_an_adapter_as_the_same_base_in_fp32_does(case: str) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(pair(case)[0]).bfloat16().to(dtype)
        attach(model, LoraConfig(r=2, alpha=4), seed=1)
        for _, layer in adapted_layers(model):
            nn.init.constant_(layer.lora_B["default"].weight, 0.05)
        hold_once(model, "bf16")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens(1, 20)).float().square().sum()
        found.append(torch.autograd.grad(loss, [weight for weight in model.parameters() if weight.requires_grad]))
    assert all(torch.equal(*gradients) for gradients in zip(*found, strict=True))


ALIASES: dict[str, dict[str, Any]] = {
    "internlm3": {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "exaone": {},
    "iquestcoder": {"head_dim": 16},
}


@pytest.mark.parametrize("model_type", ALIASES)
def test_a_checkpoint_of_an_alias_is_opened_as_its_family(model_type: str, tokenizer: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    fields = {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.3}
    config = AutoConfig.for_model(model_type, **sizes, **special, **fields, **ALIASES[model_type])
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config)
    stock.save_pretrained(tmp_path)
    opened = load_checkpoint(tmp_path)
    assert opened.config.name == "llama"
    with torch.no_grad():
        torch.testing.assert_close(opened(tokens(1, 40)), stock.eval()(tokens(1, 40)).logits, **EQUAL)


@pytest.mark.parametrize("model_type", ALIASES)
def test_fields_that_an_alias_leaves_out_have_transformers_defaults(model_type: str) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 64}
    stock = AutoConfig.for_model(model_type, **sizes).to_dict()
    found = architectures()["llama"].to_transformers(from_transformers({"model_type": model_type, **sizes}, dropout=0.0))
    for field in found.keys() & stock.keys() - {"architectures", "attention_dropout", "initializer_range", "model_type"}:
        assert stock[field] is None or found[field] == stock[field], field

"""Low-rank adapters (Hu et al. 2021) on the hand-written model, through PEFT: attached, saved and opened again.

PEFT changes the layers inside the model, and the model stays itself: the training loop sees a language model of which only the
adapter asks for gradients. What is saved opens in stock PEFT on the stock Transformers base. The base may be held in four
bits meanwhile (QLoRA, Dettmers et al. 2023); an adapter does not know it, and is merged into the full weights.

Adapters go by name: a target is a linear layer's dotted name, or the end of one or many. The head is one of them, where it has
weights of its own. Other modules may be trained in full beside them; their weights go into the adapter whole, as PEFT's
`modules_to_save` do. Here they need no wrapper, which would take a tied head away from its embedding.

Importing peft takes 2.3 s after torch, in whatever way: its own first line imports bitsandbytes, and all model classes of
Transformers that it names. So it is imported once, where an adapter is wanted.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm.adapters import lora_linear
from llm.errors import InputError
from llm.files import write_json, write_tensors
from llm.layers.dropout import Dropout
from llm.models.interface import LanguageModel

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

# On some processors bitsandbytes warns at import that it did not find a package which would fetch code from the Hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR: Literal["all-linear"] = "all-linear"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
_PREFIX = "base_model.model."  # stock PEFT's wrappers around the model, which weights are named by
_NAME = "default"  # of the adapter inside PEFT


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is."""

    r: int  # rank of the update
    alpha: int  # the update counts alpha / r
    dropout: float = 0.0  # of what the adapter reads
    target_modules: Sequence[str] | Literal["all-linear"] = ALL_LINEAR
    rslora: bool = False  # the update counts alpha / sqrt(r) (Kalajdzievski 2023)
    dora: bool = False  # length and direction of each row are learned apart (Liu et al. 2024)
    modules_to_save: Sequence[str] = ()  # trained in full, by name or end of name


def targets(model: LanguageModel, wanted: Sequence[str] | Literal["all-linear"]) -> list[str]:
    """What `wanted` is to PEFT: names, sorted. Each means the linear layers whose dotted names it is, or ends.

    "all-linear" leaves the head out, as in PEFT. An InputError tells which name means nothing, and which would, or that the
    head is no layer of its own.
    """
    layers = [name for name, _ in _linear_layers(model)]
    short = sorted({name.rpartition(".")[2] for name in layers})
    if wanted == ALL_LINEAR:
        return short
    tied = model.config.tied
    possible = dict.fromkeys(end for name in (layers if tied else [*layers, HEAD]) for end in _ends(name))
    for name in wanted:
        if name == HEAD and tied:
            raise InputError(
                f"target_modules: expected a head of its own where it names {HEAD!r}, got a tied one: its weights are the input "
                "embedding, and an adapter merged into them would change what the model reads. Leave it out, or take a base "
                "with tied = false"
            )
        if name not in possible:
            near = get_close_matches(name, possible, n=1)
            raise InputError(
                f"target_modules: expected names of {', '.join(short if tied else [*short, HEAD])} (or longer ones, as "
                f'{".".join(layers[0].split(".")[-2:])} and {layers[0]}), or "all-linear", got {name!r}'
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return sorted(set(wanted))


def modules_in_full(model: LanguageModel, wanted: Sequence[str], *, adapted: Sequence[str] = ()) -> list[str]:
    """The dotted names of the modules that `wanted` names, or ends of names, sorted; each has weights of its own.

    InputError tells which name means nothing, and which would; or that a module has an adapter already: `adapted` are targets.
    """
    tied = model.config.tied
    modules = [
        name
        for name, module in model.named_modules()
        if isinstance(module._parameters.get("weight"), nn.Parameter)
        and getattr(module.weight, "quant_state", None) is None
        and not (tied and name == HEAD)
    ]
    possible: dict[str, list[str]] = {}
    for name in modules:
        for end in _ends(name):
            possible.setdefault(end, []).append(name)
    found: set[str] = set()
    for name in wanted:
        if name not in possible:
            near = get_close_matches(name, possible, n=1)
            short = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
            aside = f"; {HEAD!r} is tied and learns with 'embed_tokens'" if tied and name == HEAD else ""
            raise InputError(
                f"modules_to_save: expected names of {short} (or longer ones, as {modules[-1]}), got {name!r}"
                + (aside or (f"; did you mean {near[0]!r}?" if near else ""))
            )
        found |= set(possible[name])
    if both := sorted(name for name in found if set(_ends(name)) & set(adapted)):
        raise InputError(
            f"modules_to_save: expected modules without an adapter, got {both[0]!r}, which target_modules names too: it learns "
            "either in full or by an adapter"
        )
    return sorted(found)


def _ends(name: str) -> list[str]:
    """`name` without its first parts: the whole, and what follows each dot."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def quantize(model: LanguageModel, *, double: bool, compute_dtype: torch.dtype | None = None) -> None:
    """Hold the linear layers of the decoder in 4-bit NormalFloat; embedding, norms and head stay as they are.

    `double` quantizes the scales of the blocks as well. Products are computed in `compute_dtype`, else in the input's.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    form: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": double}
    for name, linear in list(_linear_layers(model)):
        quantized = Linear4bit(  # type: ignore[no-untyped-call]  # bitsandbytes has no types
            linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype, device="meta", **form
        )
        # On processors that multiply bf16, bitsandbytes would repack the weight in the first validation, for good, and a
        # repacked layer passes no gradient on to what lies before it.
        quantized.support_avx512bf16_for_cpu = False
        quantized.weight = Params4bit(linear.weight.detach(), requires_grad=False, module=quantized, **form)
        model.set_submodule(name, quantized.to(linear.weight.device))  # moving to a device is what quantizes


def copy_dequantized(source: LanguageModel, target: LanguageModel) -> None:
    """Put what the layers of `source` in four bits stand for into `target`, whose layers are plain."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in source.named_modules():
        if isinstance(module, Linear4bit):
            weight = target.get_submodule(name.removesuffix(".base_layer")).weight
            stored: Any = module.weight
            assert isinstance(weight, Tensor)
            weight.data.copy_(dequantize_4bit(stored.data, stored.quant_state))


def attach(model: LanguageModel, config: LoraConfig, *, seed: int) -> None:
    """Put a new adapter into `model`, drawn from `seed`; only it and the modules trained in full ask for gradients then.

    InputError where a target is no linear layer, or the head's adapter is to have dropout.
    """
    import peft

    names = targets(model, config.target_modules)
    if HEAD in names and config.dropout > 0:
        raise InputError(
            f"dropout: expected 0 where target_modules names {HEAD!r}, got {config.dropout}: a mask follows from row and "
            "position, and the head is given positions that are learned, without their places"
        )
    full = modules_in_full(model, config.modules_to_save, adapted=names)
    peft_config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        use_rslora=config.rslora,
        use_dora=config.dora,
        modules_to_save=full or None,
        ensure_weight_tying=model.config.tied and EMBEDDING in full,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(model, peft_config)
    for _, layer in adapted_layers(model):
        layer.cast_input_dtype_enabled = False  # to fp32, from which autocast would only cast back: a tenth of a step's time
        if config.dropout > 0:  # PEFT's own dropout would depend on how rows are spread over processes
            layer.lora_dropout[_NAME] = Dropout(config.dropout)
        if lora_linear.can_join(layer.get_base_layer(), dropout=config.dropout, dora=config.dora):
            lora_linear.join(layer, adapter=_NAME)
    for module in full:
        model.get_submodule(module).requires_grad_(True)


def adapted_layers(model: LanguageModel) -> Iterator[tuple[str, "LoraLayer"]]:
    """The layers of `model` that carry an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def save_adapter(folder: Path, model: LanguageModel) -> None:
    """Write the adapter in `model` as stock PEFT does, without the place its base was read from."""
    config = _config_of(model)
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    fields |= {"base_model_name_or_path": None, "inference_mode": True}
    del fields["peft_version"]  # what an artifact holds does not depend on versions
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, fields)
    learned = _state(model) | _in_full(model)
    if config.ensure_weight_tying:  # stock PEFT asks for both names of the one weight
        learned[f"{HEAD}.weight"] = learned[f"{EMBEDDING}.weight"].clone()
    weights = {_PREFIX + name: tensor.detach().to("cpu").contiguous() for name, tensor in learned.items()}
    write_tensors(folder / WEIGHTS, weights)


def copy_adapter(source: LanguageModel, target: LanguageModel) -> None:
    """Put the adapter in `source` into `target`, which has none: another copy of the base, in four bits or not."""
    from peft import set_peft_model_state_dict

    _inject(target, _config_of(source))
    set_peft_model_state_dict(target, _state(source))
    _put_in_full(target, _in_full(source))


def load_adapter(model: LanguageModel, folder: Path) -> None:
    """Put the adapter of `folder` into `model`; an InputError says where it does not fit.

    Any LoRA adapter that PEFT has written for this architecture will do.
    """
    import peft

    config = peft.LoraConfig.from_pretrained(str(folder))
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    plain = dict(model.named_parameters(remove_duplicate=False))
    full = {name: weights.pop(name) for name in list(weights) if name in plain}
    if model.config.tied:
        _check_tied(config, weights, full, folder)
    config.modules_to_save = sorted(name.removesuffix(".weight") for name in full) or None
    _inject(model, config)
    _check_fit(_state(model), weights, folder)
    _check_fit({name: plain[name] for name in full}, full, folder)
    peft.set_peft_model_state_dict(model, {_PREFIX + name: tensor for name, tensor in weights.items()})
    _put_in_full(model, full)
    model.eval()


def _check_tied(config: Any, weights: dict[str, Tensor], full: dict[str, Tensor], folder: Path) -> None:
    """Whether head and embedding, one weight in this base, stay one; of a whole one, only the embedding is left in `full`."""
    head, embedding = full.pop(f"{HEAD}.weight", None), full.get(f"{EMBEDDING}.weight")
    alike = head is None or (embedding is not None and torch.equal(head, embedding))
    together = embedding is None or head is not None or config.ensure_weight_tying
    if not (alike and together) or any(name.startswith((f"{HEAD}.", f"{EMBEDDING}.")) for name in weights):
        raise InputError(
            f"{folder / WEIGHTS}: it adapts the head or the embedding, which are one in this base and would change together; "
            "expected an adapter of other layers, or a base with tied = false"
        )


def _linear_layers(model: LanguageModel) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers inside the decoder: a head, which may be the embedding, is not among them."""
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear):
            yield f"model.layers.{name}", module


def _inject(model: LanguageModel, config: Any) -> None:
    from peft import inject_adapter_in_model

    quantized = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    if quantized:
        # How PEFT knows; without it, it wraps these layers as if they held plain weights.
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # a module takes any attribute
    inner = copy.copy(config)  # PEFT would wrap the modules that are trained in full
    inner.modules_to_save, inner.ensure_weight_tying = None, False
    try:
        inject_adapter_in_model(inner, model, adapter_name=_NAME)
        model.peft_config[_NAME] = inner  # type: ignore[index, operator]  # PEFT puts it there
        inner.modules_to_save, inner.ensure_weight_tying = config.modules_to_save, config.ensure_weight_tying
    finally:
        if quantized:
            del model.is_loaded_in_4bit  # accelerate reads it too, and wants then what only from_pretrained sets


def _config_of(model: LanguageModel) -> Any:
    return model.peft_config[_NAME]  # type: ignore[index]  # PEFT puts it there


def _state(model: LanguageModel) -> dict[str, Tensor]:
    """The adapter's weights by PEFT's names, without the prefix of its wrappers."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False))


def _in_full(model: LanguageModel) -> dict[str, Tensor]:
    """The weights of the modules that are trained in full, by name."""
    modules: list[str] = _config_of(model).modules_to_save or []
    weights = {f"{name}.weight": model.get_submodule(name).weight for name in modules}
    return {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}


def _put_in_full(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)


def _check_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], folder: Path) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [tuple(one[name].shape) if name in one else None for one in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{folder / WEIGHTS}: the adapter was made for another base: {name}: expected shape "
                f"{shapes[0] or 'none, there is no such layer here'}, got {shapes[1] or 'no such weight'}"
            )

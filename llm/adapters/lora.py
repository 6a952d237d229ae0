"""LoRA adapters (Hu et al. 2021) on the hand-written model, through PEFT: attached, saved and loaded.

PEFT replaces layers inside the model, which stays a `LanguageModel`; in training only the adapter requires gradients. A saved
adapter opens in stock PEFT on the stock Transformers base. The base may be held in four bits during training (QLoRA, Dettmers
et al. 2023); the adapter is merged into the full weights all the same.

Targets are linear layers by dotted name, or by the end of one; the head is one where it is not tied. Other modules may be
trained in full; their whole weights are saved with the adapter, as PEFT's `modules_to_save` are. Here they need no wrapper,
which would separate a tied head from its embedding.

Importing peft takes 2.3 s after torch, so functions import it where they use it.
"""

import contextlib
import copy
import json
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
from llm.adapters.frozen import freeze, hidden_weights
from llm.errors import InputError
from llm.files import write_json, write_tensors
from llm.layers.dropout import Dropout
from llm.models.interface import LanguageModel

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

# On some processors bitsandbytes warns at import that a package is missing which would download code from the Hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR: Literal["all-linear"] = "all-linear"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
_PREFIX = "base_model.model."  # of weights' names: stock PEFT's wrappers around the model
_NAME = "default"  # of the adapter inside PEFT


@dataclass(frozen=True)
class LoraConfig:
    """The shape of an adapter and the modules that it trains."""

    r: int  # rank of the update
    alpha: int  # the update is scaled by alpha / r
    dropout: float = 0.0  # on the adapter's input
    target_modules: Sequence[str] | Literal["all-linear"] = ALL_LINEAR
    rslora: bool = False  # the update is scaled by alpha / sqrt(r) (Kalajdzievski 2023)
    dora: bool = False  # magnitude and direction of each row are learned apart (Liu et al. 2024)
    modules_to_save: Sequence[str] = ()  # trained in full, by name or end of name


def resolve_targets(model: LanguageModel, wanted: Sequence[str] | Literal["all-linear"]) -> list[str]:
    """The names in `wanted` for PEFT, sorted; each matches the linear layers whose dotted names it equals or ends.

    "all-linear" leaves the head out, as in PEFT. InputError for a name that matches nothing, with the nearest that does, and
    for the head where it is tied.
    """
    layers = [name for name, _ in _linear_layers(model)]
    short = sorted({name.rpartition(".")[2] for name in layers})
    if wanted == ALL_LINEAR:
        return short
    tied = model.config.tied
    possible = dict.fromkeys(end for name in (layers if tied else [*layers, HEAD]) for end in _suffixes(name))
    for name in wanted:
        if name == HEAD and tied:
            raise InputError(
                f"target_modules: expected a head of its own where it names {HEAD!r}, got a tied one: its weights are the "
                "input embedding, and an adapter merged into them would change what the model reads. Leave it out, or take "
                "a base with tied = false"
            )
        if name not in possible:
            near = get_close_matches(name, possible, n=1)
            raise InputError(
                f"target_modules: expected names of {', '.join(short if tied else [*short, HEAD])} (or longer ones, as "
                f'{".".join(layers[0].split(".")[-2:])} and {layers[0]}), or "all-linear", got {name!r}'
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return sorted(set(wanted))


def resolve_modules_to_save(model: LanguageModel, wanted: Sequence[str], *, adapted: Sequence[str] = ()) -> list[str]:
    """The dotted names of the modules that `wanted` matches by name or end of name, sorted; each has weights of its own.

    InputError for a name that matches nothing, with the nearest that does, and for a module among the targets `adapted`.
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
        for end in _suffixes(name):
            possible.setdefault(end, []).append(name)
    found: set[str] = set()
    for name in wanted:
        if name not in possible:
            near = get_close_matches(name, possible, n=1)
            short = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
            tied_head = f"; {HEAD!r} is tied and learns with 'embed_tokens'" if tied and name == HEAD else ""
            raise InputError(
                f"modules_to_save: expected names of {short} (or longer ones, as {modules[-1]}), got {name!r}"
                + (tied_head or (f"; did you mean {near[0]!r}?" if near else ""))
            )
        found |= set(possible[name])
    if both := sorted(name for name in found if set(_suffixes(name)) & set(adapted)):
        raise InputError(
            f"modules_to_save: expected modules without an adapter, got {both[0]!r}, which target_modules names too: it "
            "learns either in full or by an adapter"
        )
    return sorted(found)


def _suffixes(name: str) -> list[str]:
    """The dotted name itself, and the rest after each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def quantize(model: LanguageModel, *, double: bool, compute_dtype: torch.dtype | None = None) -> None:
    """Quantize the linear layers of the decoder to 4-bit NormalFloat; embedding, norms and head stay as they are.

    `double` quantizes the scales of the blocks as well. Products are computed in `compute_dtype`, by default in the input's.
    One layer at a time is in fp32, so a model whose weights are pages of its file is never in memory as a whole.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    form: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": double}
    for name in [name for name, _ in _linear_layers(model)]:  # of the layers themselves no list, so that they go one by one
        linear: Any = model.get_submodule(name)
        quantized = Linear4bit(  # type: ignore[no-untyped-call]  # bitsandbytes has no types
            *(linear.in_features, linear.out_features, linear.bias is not None),
            compute_dtype=compute_dtype,
            device="meta",
            **form,
        )
        quantized.bias = linear.bias
        # On processors that multiply bf16, bitsandbytes would repack the weight for good in the first validation, and a
        # repacked layer passes no gradient on to its input.
        quantized.support_avx512bf16_for_cpu = False
        quantized.weight = Params4bit(linear.weight.detach().float(), requires_grad=False, module=quantized, **form)
        model.set_submodule(name, quantized.to(linear.weight.device))  # moving to a device quantizes


def copy_dequantized(source: LanguageModel, target: LanguageModel) -> None:
    """Copy the dequantized weights of the 4-bit layers of `source` into `target`, whose layers are plain."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in source.named_modules():
        if isinstance(module, Linear4bit):
            weight = target.get_submodule(name.removesuffix(".base_layer")).weight
            stored: Any = module.weight
            assert isinstance(weight, Tensor)
            weight.data.copy_(dequantize_4bit(stored.data, stored.quant_state))


def attach(model: LanguageModel, config: LoraConfig, *, seed: int) -> None:
    """Put a new adapter into `model`, drawn from `seed`; then only it and the modules trained in full require gradients.

    InputError where a target is not a linear layer, or where the head would get dropout.
    """
    import peft

    names = resolve_targets(model, config.target_modules)
    if HEAD in names and config.dropout > 0:
        raise InputError(
            f"dropout: expected 0 where target_modules names {HEAD!r}, got {config.dropout}: a mask depends on row and "
            "position, and the head gets only the positions that are learned, without their places"
        )
    full = resolve_modules_to_save(model, config.modules_to_save, adapted=names)
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
    freeze(model)
    for module in full:
        model.get_submodule(module).requires_grad_(True).float()  # its master weights
    if config.dora:  # lengths of rows are those of the exact weights
        for name, linear in _linear_layers(model):
            if any(end in names for end in _suffixes(name)):
                linear.float()
    with torch.random.fork_rng(), contextlib.nullcontext() if config.dora else hidden_weights(model):
        torch.manual_seed(seed)
        _inject(model, peft_config)
    for _, layer in adapted_layers(model):
        layer.cast_input_dtype_enabled = False  # a cast to fp32 that autocast undoes: a tenth of a step's time
        if config.dropout > 0:  # PEFT's own dropout depends on how rows are distributed over processes
            layer.lora_dropout[_NAME] = Dropout(config.dropout)
        if lora_linear.can_fuse(layer.get_base_layer(), dropout=config.dropout, dora=config.dora):
            lora_linear.fuse(layer, adapter=_NAME)
    for module in full:
        model.get_submodule(module).requires_grad_(True)


def adapted_layers(model: LanguageModel) -> Iterator[tuple[str, "LoraLayer"]]:
    """The layers of `model` that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def save_adapter(folder: Path, model: LanguageModel) -> None:
    """Write the adapter in `model` as stock PEFT does, without the path of its base."""
    config = _config_of(model)
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    fields |= {"base_model_name_or_path": None, "inference_mode": True}
    del fields["peft_version"]  # an artifact's bytes do not depend on versions
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, fields)
    learned = _state(model) | _saved_modules(model)
    if config.ensure_weight_tying:  # stock PEFT asks for both names of the one weight
        learned[f"{HEAD}.weight"] = learned[f"{EMBEDDING}.weight"].clone()
    weights = {_PREFIX + name: tensor.detach().to("cpu").contiguous() for name, tensor in learned.items()}
    write_tensors(folder / WEIGHTS, weights)


def copy_adapter(source: LanguageModel, target: LanguageModel) -> None:
    """Copy the adapter of `source` into `target`, another copy of the base without one, in four bits or not."""
    from peft import set_peft_model_state_dict

    _inject(target, _config_of(source))
    set_peft_model_state_dict(target, _state(source))
    _copy_saved_modules(target, _saved_modules(source))


def load_adapter(model: LanguageModel, folder: Path) -> None:
    """Put the adapter of `folder` into `model`: any LoRA adapter that PEFT wrote for this architecture. InputError where it
    does not fit.
    """
    full = load_low_rank(model, folder, with_modules=True)
    _copy_saved_modules(model, full)
    model.eval()


def load_low_rank(model: LanguageModel, folder: Path, *, with_modules: bool = False) -> dict[str, Tensor]:
    """Put the low-rank matrices of an adapter into `model`; returns the weights of the modules that were trained in full.

    Linear layers may hold nothing meanwhile, unless `with_modules`, which says that those weights are the model's, too.
    """
    import peft

    check_config(folder)
    config = peft.LoraConfig.from_pretrained(str(folder))
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    plain = dict(model.named_parameters(remove_duplicate=False))
    full = {name: weights.pop(name) for name in list(weights) if name in plain}
    if model.config.tied:
        _check_tied(config, weights, full, folder)
    _check_fit({name: plain[name] for name in full}, full, folder)
    config.modules_to_save = (sorted({name.rpartition(".")[0] for name in full}) or None) if with_modules else None
    with contextlib.nullcontext() if with_modules or config.use_dora else hidden_weights(model):
        _inject(model, config)
        _check_fit(_state(model), weights, folder)
        peft.set_peft_model_state_dict(model, {_PREFIX + name: tensor for name, tensor in weights.items()})
    return full


def check_config(folder: Path) -> None:
    """InputError if the adapter's configuration would have PEFT import a module that it names."""
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected the configuration of a LoRA adapter, got another file: {error}") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type: expected 'LORA', got another kind")
    mapping = found.get("auto_mapping")
    library = str(mapping.get("parent_library", "")) if isinstance(mapping, dict) else str(mapping or "transformers")
    if found.get("megatron_config") is not None or library.partition(".")[0] != "transformers":
        raise InputError(
            f"{path}: auto_mapping, megatron_config: expected a model of Transformers and none of Megatron, since PEFT "
            f"imports the module that is named, got {library!r:.80} and {found.get('megatron_config')!r:.80}"
        )


def uses_dora(folder: Path) -> bool:
    """Whether the adapter learns lengths and directions of rows apart."""
    return bool(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("use_dora"))


def _check_tied(config: Any, weights: dict[str, Tensor], full: dict[str, Tensor], folder: Path) -> None:
    """InputError unless head and embedding, one weight in this base, stay one. Removes the head from `full`."""
    head, embedding = full.pop(f"{HEAD}.weight", None), full.get(f"{EMBEDDING}.weight")
    equal = head is None or (embedding is not None and torch.equal(head, embedding))
    together = embedding is None or head is not None or config.ensure_weight_tying
    if not (equal and together) or any(name.startswith((f"{HEAD}.", f"{EMBEDDING}.")) for name in weights):
        raise InputError(
            f"{folder / WEIGHTS}: expected an adapter of other layers, or a base with tied = false, got one of the head or "
            "the embedding, which share their weight in this base"
        )


def _linear_layers(model: LanguageModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers inside the decoder layers, by dotted name; the head is not among them."""
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear):
            yield f"model.layers.{name}", module


def _inject(model: LanguageModel, config: Any) -> None:
    from peft import inject_adapter_in_model

    quantized = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    if quantized:
        # Without this flag PEFT wraps these layers as if they held plain weights.
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # a module takes any attribute
    inner = copy.copy(config)  # without modules_to_save, which PEFT would wrap
    inner.modules_to_save, inner.ensure_weight_tying = None, False
    try:
        inject_adapter_in_model(inner, model, adapter_name=_NAME)
        model.peft_config[_NAME] = inner  # type: ignore[index, operator]  # PEFT puts it there
        inner.modules_to_save, inner.ensure_weight_tying = config.modules_to_save, config.ensure_weight_tying
    finally:
        if quantized:
            del model.is_loaded_in_4bit  # accelerate reads it too, and then needs attributes that only from_pretrained sets


def _config_of(model: LanguageModel) -> Any:
    return model.peft_config[_NAME]  # type: ignore[index]  # PEFT puts it there


def _state(model: LanguageModel) -> dict[str, Tensor]:
    """The adapter's weights under PEFT's names, without the prefix of its wrappers."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False))


def _saved_modules(model: LanguageModel) -> dict[str, Tensor]:
    """The weights of the modules that are trained in full, by name."""
    modules: list[str] = _config_of(model).modules_to_save or []
    return {
        f"{name}.{part}": weight
        for name in modules
        for part, weight in model.get_submodule(name).named_parameters(recurse=False)
    }


def _copy_saved_modules(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)


def _check_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], folder: Path) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        expected, got = (f"shape {tuple(one[name].shape)}" if name in one else "no such weight" for one in (wanted, found))
        if expected != got:
            raise InputError(
                f"{folder / WEIGHTS}: {name}: expected {expected}, as in this base, got {got}: it adapts another base"
            )

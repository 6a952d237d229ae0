"""Low-rank adapters (Hu et al. 2021) on the hand-written model, through PEFT: attached, saved and opened again.

PEFT changes the layers inside the model, and the model stays itself: the training loop sees a Llama of which only the
adapter asks for gradients. What is saved opens in stock PEFT on the stock Transformers base. The base may be held in four
bits meanwhile (QLoRA, Dettmers et al. 2023); an adapter does not know it, and is merged into the full weights.

Adapters go by name: a target is a linear layer's dotted name, or the end of one or many. The head is one of them, where it has
weights of its own.

Importing peft takes 2.3 s after torch, in whatever way: its own first line imports bitsandbytes, and all model classes of
Transformers that it names. So it is imported once, where an adapter is wanted.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm.dropout import Dropout
from llm.errors import InputError
from llm.files import write_json, write_tensors
from llm.models.llama.model import Llama

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
class Settings:
    """What an adapter is."""

    r: int  # rank of the update
    alpha: int  # the update counts alpha / r
    dropout: float = 0.0  # of what the adapter reads
    target_modules: Sequence[str] | Literal["all-linear"] = ALL_LINEAR
    rslora: bool = False  # the update counts alpha / sqrt(r) (Kalajdzievski 2023)
    dora: bool = False  # length and direction of each row are learned apart (Liu et al. 2024)


def targets(model: Llama, wanted: Sequence[str] | Literal["all-linear"]) -> list[str]:
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
                f"target_modules wants a head of its own where it names {HEAD!r}; found a tied one: its weights are the input "
                "embedding, and an adapter merged into them would change what the model reads. Leave it out, or take a base "
                "with tied = false"
            )
        if name not in possible:
            near = get_close_matches(name, possible, n=1)
            raise InputError(
                f"target_modules wants names of {', '.join(short if tied else [*short, HEAD])} (or longer ones, as "
                f'{".".join(layers[0].split(".")[-2:])} and {layers[0]}), or "all-linear"; found {name!r}'
                + (f", nearest is {near[0]!r}" if near else "")
            )
    return sorted(set(wanted))


def _ends(name: str) -> list[str]:
    """`name` without its first parts: the whole, and what follows each dot."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def quantize(model: Llama, *, double: bool, compute_dtype: torch.dtype | None = None) -> None:
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


def attach(model: Llama, settings: Settings, *, seed: int) -> None:
    """Put a new adapter into `model`, drawn from `seed`; nothing else in it asks for gradients any more.

    InputError where a target is no linear layer, or the head's adapter is to have dropout.
    """
    from peft import LoraConfig

    names = targets(model, settings.target_modules)
    if HEAD in names and settings.dropout > 0:
        raise InputError(
            f"dropout wants 0 where target_modules names {HEAD!r}, found {settings.dropout}: a mask follows from row and "
            "position, and the head is given positions that are learned, without their places"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(model, config)
    for _, layer in adapted_layers(model):
        layer.cast_input_dtype_enabled = False  # to fp32, from which autocast would only cast back: a tenth of a step's time
        if settings.dropout > 0:  # PEFT's own dropout would depend on how rows are spread over processes
            layer.lora_dropout[_NAME] = Dropout(settings.dropout)


def adapted_layers(model: Llama) -> Iterator[tuple[str, "LoraLayer"]]:
    """The layers of `model` that carry an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def save_adapter(folder: Path, model: Llama) -> None:
    """Write the adapter in `model` as stock PEFT does, without the place its base was read from."""
    config = _config_of(model)
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    fields |= {"base_model_name_or_path": None, "inference_mode": True}
    del fields["peft_version"]  # what an artifact holds does not depend on versions
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, fields)
    weights = {_PREFIX + name: tensor.detach().to("cpu").contiguous() for name, tensor in _state(model).items()}
    write_tensors(folder / WEIGHTS, weights)


def copy_adapter(source: Llama, target: Llama) -> None:
    """Put the adapter in `source` into `target`, which has none: another copy of the base, in four bits or not."""
    from peft import set_peft_model_state_dict

    _inject(target, _config_of(source))
    set_peft_model_state_dict(target, _state(source))


def load_adapter(model: Llama, folder: Path) -> None:
    """Put the adapter of `folder` into `model`; an InputError says where it does not fit.

    Any LoRA adapter that PEFT has written for this architecture will do.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder))
    weights = load_file(folder / WEIGHTS)
    shared = {f"{_PREFIX}{HEAD}.", f"{_PREFIX}{EMBEDDING}."}
    if model.config.tied and any(name.startswith(start) for name in weights for start in shared):
        raise InputError(
            f"{folder / WEIGHTS}: it adapts the head or the embedding, which are one in this base and would change together; "
            "wants an adapter of other layers, or a base with tied = false"
        )
    _inject(model, config)
    _check_fit(model, weights, folder)
    set_peft_model_state_dict(model, weights)
    model.eval()


def _linear_layers(model: Llama) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers inside the decoder: a head, which may be the embedding, is not among them."""
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            yield f"model.layers.{name}", module


def _inject(model: Llama, config: Any) -> None:
    from peft import inject_adapter_in_model

    quantized = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    if quantized:
        # How PEFT knows; without it, it wraps these layers as if they held plain weights.
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # a module takes any attribute
    try:
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    finally:
        if quantized:
            del model.is_loaded_in_4bit  # accelerate reads it too, and wants then what only from_pretrained sets


def _config_of(model: Llama) -> Any:
    return model.peft_config[_NAME]  # type: ignore[index]  # PEFT puts it there


def _state(model: Llama) -> dict[str, Tensor]:
    """The adapter's weights by PEFT's names, without the prefix of its wrappers."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False))


def _check_fit(model: Llama, weights: dict[str, Tensor], folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in _state(model).items()}
    found = {name.removeprefix(_PREFIX): tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{folder / WEIGHTS}: the adapter was made for another base: {name} wants shape "
                f"{wanted.get(name, 'none, there is no such layer here')}, found {found.get(name, 'no such weight')}"
            )

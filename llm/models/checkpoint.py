"""A model folder on disk, exactly as stock Transformers reads and writes it, without any state of a training.

`config.json`, `model.safetensors` (or shards and their index), the tokenizer's files and `generation_config.json`. Weights are
read from safetensors only, and a configuration that the hand-written model does not support is refused with the name of the
field. `llm.models.import_checkpoint` takes over folders from elsewhere.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llm.errors import InputError
from llm.files import KINDS, read_json, write_json, write_tensors
from llm.models import architectures, from_transformers
from llm.models.families import families
from llm.models.interface import LanguageModel, ModelConfig
from llm.models.sampling_defaults import FILE, Sampling, read_sampling
from llm.tokenizer.tokenizer import TextTokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-{}-of-{}.safetensors"
MOST_TOKENS = 1 << 24  # of a vocabulary; the largest known one has 262,144
MOST_WEIGHTS = 20_000  # of a file; Llama 3.1 405B has 1,138
SHARD_BYTES = 5 * 10**9  # as in huggingface_hub: files of this size are downloaded in parallel, and read one after the other
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def save_checkpoint(
    folder: Path,
    model: LanguageModel,
    tokenizer_folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write the model and a copy of the tokenizer's files into `folder`; a tied head is stored once.

    Weights are stored in `dtype` (None: that of each), and in several files where they have more than `shard_bytes`. Where
    `tokenizer_folder` is a checkpoint, the tokens that end its answers and its sampling defaults are copied too. With `read`,
    a weight is what that gives for its name when it is written, in fp32 or as it is stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        source = tokenizer_folder / name
        if source.exists() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tokenizer = TextTokenizer.load(tokenizer_folder)
    sampling = read_sampling(tokenizer_folder)
    how: dict[str, Any] = {"dtype": dtype, "shard_bytes": shard_bytes, "read": read}
    write_model(folder, model.config, weights, tokenizer=tokenizer, sampling=sampling, **how)


def write_model(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: TextTokenizer,
    sampling: Sampling | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write everything but the tokenizer's own files; of a tied head only the embedding."""
    embedding = weights["model.embed_tokens.weight"]
    stored = str(dtype or embedding.dtype).removeprefix("torch.")
    fields = architectures()[config.name].to_transformers(config) | {"vocab_size": len(embedding), "dtype": stored}
    write_json(folder / CONFIG, fields | tokenizer.special_ids)
    write_json(folder / FILE, tokenizer.special_ids | {"do_sample": False} | dict(sampling or {}))
    kept = {name: tensor for name, tensor in weights.items() if not (config.tied and name == "lm_head.weight")}
    _write_weights(folder, kept, dtype=dtype, shard_bytes=shard_bytes, read=read or kept.__getitem__)


def _write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
    read: Callable[[str], Tensor],
) -> None:
    """Write one file, or shards and then the index that names them: without it, shards are no model."""
    for old in (folder / INDEX, folder / WEIGHTS, *folder.glob(SHARDS.format("*", "*"))):
        old.unlink(missing_ok=True)
    sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in weights.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [WEIGHTS] if len(shards) == 1 else [_shard_name(index, len(shards)) for index in range(len(shards))]
    for file, names in zip(files, shards, strict=True):  # one weight at a time is cast
        shapes = {name: torch.empty_like(weights[name], dtype=dtype, device="meta") for name in names}
        write_tensors(folder / file, shapes, read=lambda name: _stored(name, read(name), dtype or weights[name].dtype))
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def _shard_name(index: int, count: int) -> str:
    return SHARDS.format(f"{index + 1:05d}", f"{count:05d}")


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    found = tensor.to("cpu", dtype).contiguous()
    if dtype == torch.float16 and found.isinf().any() and not tensor.isinf().any():
        largest = float(tensor.abs().max())
        raise InputError(f"{name}: expected weights within 65,504, the largest of fp16, got {largest:,.0f}; bf16 can store it")
    return found


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a model folder that was written here holds its weights."""
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["dtype"]
    dtype: torch.dtype = getattr(torch, found)
    return dtype


def load_checkpoint(
    folder: Path, *, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu", dropout: float = 0.0
) -> LanguageModel:
    """Open a model folder. `dtype` None keeps weights as they are stored: on a CPU they are then pages of the file, which all
    processes of a machine share. `dropout` is for further training: a checkpoint does not record it.
    """
    config, vocab_size = read_config(folder / CONFIG, dropout=dropout)
    stored = read_weights(folder, config, vocab_size=vocab_size, device=device)
    # Each goes when it is cast, and with it the pages of the file.
    weights = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in _popped(stored)}
    if config.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = _without_weights(config, vocab_size)
    model.load_state_dict(weights, assign=True)
    if config.tied:
        model.lm_head.weight = model.embedding.weight
    return model.eval()


def _popped(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in list(tensors):
        yield name, tensors.pop(name)


def read_config(path: Path, *, dropout: float = 0.0) -> tuple[ModelConfig, int]:
    """The architecture and vocabulary size in a Transformers `config.json`; InputError names a field that is not supported."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise InputError(f"{path}: expected a model folder as Transformers writes it, got no file") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a table, got {found!r:.80}")
    try:
        config = from_transformers(found, dropout=dropout)
        if not isinstance(vocab_size := found.get("vocab_size"), int) or not 0 < vocab_size <= MOST_TOKENS:
            raise InputError(f"vocab_size: expected a whole number from 1 to {MOST_TOKENS:,}, got {vocab_size!r:.80}")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return config, vocab_size


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or the shards that its index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        raise InputError(f"{folder}: {no_weights(path.name for path in folder.iterdir())}")
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: expected a table weight_map of names of files, got something else") from error
    if outside := [
        name for name in names if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors")
    ]:
        raise InputError(f"{index}: weight_map: expected names of *.safetensors files beside it, got {outside[0]!r}")
    return [folder / name for name in names]


def no_weights(names: Iterable[str]) -> str:
    """The reason for refusing a model whose files, of these names, hold no readable weights."""
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    other = f"only {pickles[0]}, a pickle, which can run code when it is opened" if pickles else "no such file"
    return f"expected weights in {WEIGHTS}, or in shards that {INDEX} names, got {other}"


def read_weights(
    folder: Path, config: ModelConfig, *, vocab_size: int, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """A folder's weights by name, as stored; of a tied head only the embedding. InputError unless they are exactly those of
    the architecture."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            weights |= _read_tensors(path, device=str(device))
        except FileNotFoundError:
            raise InputError(f"{path}: expected a file, since {INDEX} names it, got none") from None
        except SafetensorError as error:
            raise InputError(f"{path}: expected a whole safetensors file, got one that cannot be read: {error}") from error
    weights = {families()[config.name].weight_name(name): weight for name, weight in weights.items()}
    for name in [name for name in weights if name.endswith("rotary_emb.inv_freq")]:  # older Transformers wrote it
        del weights[name]
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if config.tied and head is not None:
        if embedding is not None and not torch.equal(head, embedding):
            raise InputError(
                f"{folder / CONFIG}: tie_word_embeddings: expected false, got true: lm_head.weight is not the embedding"
            )
        del weights["lm_head.weight"]
    expected = tensor_shapes(config, vocab_size=vocab_size)
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*expected, *got]:
        if expected.get(name) != got.get(name):
            raise InputError(
                f"{folder}: {name}: expected {_shape(expected.get(name))}, got {_shape(got.get(name))}: the weights are not "
                "those of its config.json"
            )
    return weights


def tensor_shapes(config: ModelConfig, *, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights by name; of a tied head only the embedding."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _without_weights(config, vocab_size).state_dict().items()}
    if config.tied:
        del shapes["lm_head.weight"]
    return shapes


def _read_tensors(path: Path, *, device: str) -> dict[str, Tensor]:
    """The tensors of a file; on a CPU each is a mapping of its own part of it, whose pages go when the tensor does.

    The library would map the whole file for each, which a limit of address space does not allow.
    """
    if path.exists() and not path.is_file():  # a pipe would never open
        raise InputError(f"{path}: expected a file, got something else")
    with safe_open(path, framework="pt", device=device) as file:  # which checks what the file says of itself
        names = list(file.keys())
        if len(names) > MOST_WEIGHTS:
            raise InputError(f"{path}: expected at most {MOST_WEIGHTS:,} weights, got {len(names):,}")
        if device != "cpu":
            return {name: file.get_tensor(name) for name in names}
    with path.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {name: _mapped(path, 8 + size, header[name]) for name in names}


def _mapped(path: Path, start: int, entry: Mapping[str, Any]) -> Tensor:
    """The tensor of an entry of a safetensors file, whose contents begin at `start`; writing to it does not change the
    file."""
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    kind = next((name for name, kind in KINDS.items() if kind == entry["dtype"]), None)
    if kind is None:
        raise InputError(f"{path}: expected weights of {', '.join(KINDS.values())}, got {entry['dtype']}")
    dtype: torch.dtype = getattr(torch, kind)
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    content = np.memmap(path, dtype=np.uint8, mode="c", offset=start + begin, shape=(end - begin,))
    return torch.from_numpy(content).view(dtype).view(shape)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such weight" if shape is None else f"shape {shape}"


class _SkipInit(TorchFunctionMode):
    """Skips every function of `torch.nn.init`, which even on the meta device import torch.compile: that takes a second."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _without_weights(config: ModelConfig, vocab_size: int) -> LanguageModel:
    with torch.device("meta"), _SkipInit():  # no time for drawing weights that are replaced at once
        return architectures()[config.name].build(config, vocab_size=vocab_size)

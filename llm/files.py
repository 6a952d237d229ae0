"""Writes files and folders that are complete under their final name: under a temporary name first, then renamed. Reads files
of others, of which no more is read than they may have.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.errors import InputError

if TYPE_CHECKING:  # this module is also used where torch is not imported
    from torch import Tensor

# Of safetensors, for dtypes of torch.
KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
KINDS |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
TEMPORARY = ".tmp"  # ends the name of what is not complete
LARGEST_JSON = 8 << 20  # bytes of a configuration; lists of lists take 25 times as much in memory


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` at the end; on an error it is removed, so that a full disk gets no fuller."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # of a write
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, renamed to `path` at the end; on an error it is removed. `path` does not exist by then."""
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_bounded(path: Path, largest: int) -> bytes:
    """The bytes of a file, one more than `largest` at most. OSError at once for something else, such as a pipe or a device, of
    which reading may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        content, left = b"", largest + 1
        while left > 0 and (piece := os.read(descriptor, min(left, max(status.st_size - len(content), 0) + 1))):
            content, left = content + piece, left - len(piece)
        return content
    finally:
        os.close(descriptor)


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """The text of somebody else's file; FileNotFoundError if there is none, InputError if it is no such file."""
    try:
        content = read_bounded(path, largest)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: expected a file that can be read, got something else: {error.strerror}") from error
    if len(content) > largest:
        raise InputError(f"{path}: expected at most {largest:,} bytes, got more")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, got byte {content[error.start]:#04x}") from error


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """The value in somebody else's JSON file; FileNotFoundError if there is none, InputError if it is no such file."""
    try:
        return json.loads(read_text(path, largest))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got a file that cannot be parsed: {error}") from error


def private_folder(path: Path) -> Path:
    """`path`, made for its owner alone where it is missing. PermissionError if another user may have written to it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    kind = "a link" if stat.S_ISLNK(found.st_mode) else "one of another user" if found.st_uid != os.geteuid() else ""
    if kind or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, kind or "one that others can write to", str(path))
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        path.chmod(0o700)
    return path


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` with sorted keys, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", *, read: "Callable[[str], Tensor] | None" = None) -> None:
    """Write `tensors` to `path` as safetensors (https://huggingface.co/docs/safetensors), one after the other.

    The bytes are those that the library writes, which would hold a copy of all of them. With `read`, `tensors` only say dtypes
    and shapes, and each content is asked for when it is written.
    """
    import torch
    from safetensors.torch import save

    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    written = save(empty)
    order = list(json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        stop = place + tensors[name].numel() * tensors[name].element_size()
        kind = KINDS[str(tensors[name].dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [place, stop]}
        place = stop
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with whole_file(path) as temporary, temporary.open("wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            content = (read(name) if read else tensors[name]).detach().to("cpu").contiguous()
            assert content.dtype == tensors[name].dtype and content.shape == tensors[name].shape
            bytes_left = content.reshape(-1).view(torch.uint8).numpy().data
            while bytes_left:
                bytes_left = bytes_left[file.write(bytes_left) :]

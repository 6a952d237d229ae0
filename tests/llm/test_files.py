"""Files of tensors: the bytes of the safetensors library, written one tensor after the other."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from llm.files import write_tensors


def test_tensors_are_written_as_the_library_writes_them_without_a_copy_of_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 4).bfloat16(),
        "a": torch.randn(5),
        "count": torch.zeros(2, dtype=torch.int64),
        "layers.10": torch.randn(2, 2).half(),
        "layers.2": torch.randn(4, 2).t().contiguous(),
        "number": torch.tensor(3.0),
        "nothing": torch.zeros(0, 3),
        "packed": torch.arange(6, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    write_tensors(tmp_path / "own", tensors)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    write_tensors(tmp_path / "asked", shapes, read=read)
    assert (tmp_path / "asked").read_bytes() == (tmp_path / "library").read_bytes()
    assert sorted(asked) == sorted(tensors), "each once"

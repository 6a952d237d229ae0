"""Dropout whose mask is a function of where it acts, not of a generator's state.

The mask of an element is a hash of (seed, step, row of the optimizer step, site, position, channel). So it does not depend on
the process or micro-batch that computes the row, nor on a resume. The hash is not cryptographic: masks only have to look
independent.
"""

import torch
from torch import Tensor, nn


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 values within 32 bits: each output bit depends on each input bit (the finalizer of MurmurHash3)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


class Dropout(nn.Module):
    """Zeroes a share `rate` of x (B, T, C) in training and scales up the rest. `set_counters` comes first."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.counters: Tensor | None = None  # (B,): one hash per row, of seed, step, row and site

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        if self.rate == 0 or not self.training:
            return x
        if self.counters is None:
            raise RuntimeError("dropout: expected set_counters before a forward pass in training, got none")
        return x * (self.keep(x) * (1 / (1 - self.rate))).to(x.dtype)

    def keep(self, x: Tensor) -> Tensor:
        """The mask for x (B, T, C): True where an element is kept. Each 32-bit hash decides two channels, 16 bits each."""
        assert self.counters is not None
        _, length, channels = x.shape
        position = _mix(self.counters[:, None] + torch.arange(length, device=x.device) * 0x9E3779B1)  # (B, T)
        channel = _mix(torch.arange((channels + 1) // 2, device=x.device) + 0x632BE59B)
        # 32-bit arithmetic from here on, which wraps around: the costly part, in half the memory of int64.
        mixed = position.to(torch.int32)[:, :, None] + channel.to(torch.int32)  # (B, T, C / 2)
        mixed ^= (mixed >> 16) & 0xFFFF
        mixed *= 0x7FEB352D  # constants: the two-round `lowbias32` of C. Wellons's hash prospector
        mixed ^= (mixed >> 15) & 0x1FFFF
        mixed *= -0x7B935975  # 0x846CA68B
        mixed ^= (mixed >> 16) & 0xFFFF
        halves = mixed.view(torch.int16)[:, :, :channels]  # uniform on -32768..32767
        return halves >= round(self.rate * 65536) - 32768

    def extra_repr(self) -> str:
        """The rate, for the model's repr."""
        return f"rate={self.rate}"


def set_counters(model: nn.Module, *, seed: int, step: int, rows: Tensor) -> None:
    """Set the rows (B,) and the optimizer step of the next forward pass in every Dropout; sites count in module order."""
    sites = [module for module in model.modules() if isinstance(module, Dropout) and module.rate > 0]
    if not sites:
        return
    start = (seed * 0x9E3779B1) ^ (step * 0x85EBCA77) ^ ((seed >> 32) * 0x27D4EB2F)
    row = _mix(_mix(torch.tensor(start & (2**63 - 1), device=rows.device)) + rows.to(torch.int64) * 0xC2B2AE3D)
    for site, module in enumerate(sites):
        module.counters = _mix(row + (site + 1) * 0x27D4EB2F)

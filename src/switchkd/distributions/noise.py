"""Randomness with an address: every draw is a pure function of (seed, prompt id, sample id, position, stream).

There is no generator state. A counter-based hash turns an address into uniforms, and those into Gumbel noise, so a draw does
not depend on the batch, the block size, the number of processes or where a run was resumed. The principle is that of Salmon et
al. 2011; the constants of the 32-bit finalizer, `lowbias32`, come from C. Wellons' hash search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from switchkd.records import Prompt

_MASK_64 = (1 << 64) - 1


class Stream(IntEnum):
    """The independent draws at one position."""

    PROPOSAL = 0
    KEEP = 1
    EXCESS = 2
    COIN = 3


@dataclass(frozen=True)
class Address:
    """Where draws are made: `key` (from seed, prompt and sample) and `position`, int64 tensors of one shape."""

    key: Tensor
    position: Tensor

    def at(self, index: Tensor | slice | tuple[Tensor | slice | int, ...]) -> Address:
        """The addresses that a mask or an index selects."""
        return Address(self.key[index], self.position[index])


def _mix_64(value: int) -> int:
    """The splitmix64 finalizer on a Python integer, as an unsigned 64-bit integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def row_keys(seed: int, prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> Tensor:
    """One key per prompt, shape (B,), int64 of 62 bits, from its (seed, prompt_id, sample_id) alone."""
    # Mixed after each part, so that swapped or shifted ids do not meet in one key.
    keys = [
        _mix_64(_mix_64(_mix_64(seed & _MASK_64) ^ p.prompt_id & _MASK_64) ^ p.sample_id & _MASK_64) for p in prompts
    ]
    return torch.tensor([key >> 2 for key in keys], dtype=torch.int64, device=device)


def _mix_32_(x: Tensor) -> Tensor:
    """The lowbias32 finalizer on int32, in place."""
    # torch shifts arithmetically, so the copies of the sign bit are masked off.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _as_int32(x: Tensor) -> Tensor:
    """The low 32 bits of an int64 as a new int32."""
    return (((x + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)).to(torch.int32)


def _open_unit(key: Tensor, place: Tensor, counters: Tensor) -> Tensor:
    """Float32 uniforms strictly inside (0, 1), from 31 bits, shape of `place` + (counters,)."""
    low = _mix_32_(_as_int32(key) ^ _mix_32_(_as_int32(place + 0x3C6EF372)))
    # The key's other half enters a round later, so that two addresses that collide in `low` still differ.
    high = _mix_32_(_as_int32(key >> 31) + low)
    bits = _mix_32_(counters * (0x9E3779B9 - (1 << 32)) ^ low.unsqueeze(-1))
    bits = _mix_32_(bits.add_(high.unsqueeze(-1))).bitwise_and_(0x7FFFFFFF)
    # Near 0 the uniforms keep float32's relative precision, which Gumbel noise needs; the clamp keeps rounding from giving 1.
    return bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def _place(address: Address, stream: Stream) -> Tensor:
    return address.position * len(Stream) + int(stream)


def uniforms(address: Address, *streams: Stream) -> tuple[Tensor, ...]:
    """For each stream one float32 uniform in (0, 1) per address, in the address's shape."""
    places = torch.stack([_place(address, stream) for stream in streams])
    nothing = torch.zeros(1, dtype=torch.int32, device=address.key.device)
    return _open_unit(address.key, places, nothing)[..., 0].unbind(dim=0)


def uniform(address: Address, stream: Stream) -> Tensor:
    """One float32 uniform in (0, 1) per address, in the address's shape."""
    return uniforms(address, stream)[0]


def gumbel(address: Address, stream: Stream, vocabulary_size: int) -> Tensor:
    """Standard Gumbel noise, float32, the address's shape + (V,); the argmax of log p + noise is a draw from p."""
    counters = torch.arange(vocabulary_size, dtype=torch.int32, device=address.key.device)
    # If u is uniform, so is 1 - u; -log(1 - u) by log1p keeps the small exponentials exact.
    exponential = torch.log1p(_open_unit(address.key, _place(address, stream), counters).neg_()).neg_()
    return exponential.log_().neg_()

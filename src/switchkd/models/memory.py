"""How much is computed at once, by the device that computes it."""

from __future__ import annotations

import torch

# Numbers in one tensor, whatever else is full. 64 MB in float32: on a CPU more of it at once is no faster.
AT_LEAST = 1 << 24
# 256 MB, for a device that does not tell how much it has left: 64 rows of 4 tokens of 152k ids are one group.
_UNTOLD = 1 << 26
# To compare two distributions takes about ten float32 tensors of their size.
BYTES_A_NUMBER = 10 * 4
# 1 MB in float32, of which the dozen passes over it find most in the cache: at 131,072 ids noise costs two thirds of what it does
# whole, and a divergence less than half.
_IN_CACHE = 1 << 18


def numbers_at_once(device: torch.device) -> int:
    """The numbers that each tensor of a comparison of distributions may hold. It bounds memory and changes no token."""
    if device.type == "cpu":
        return AT_LEAST
    if device.type != "cuda":
        return _UNTOLD
    # What torch has reserved and does not use counts as taken for the driver.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Half of the memory stays free.
    return max(AT_LEAST, (torch.cuda.mem_get_info(device)[0] + unused) // (2 * BYTES_A_NUMBER))


def numbers_in_cache(device: torch.device) -> int:
    """The numbers of each tensor in a computation that goes over them many times. It bounds no memory and changes no token."""
    return _IN_CACHE if device.type == "cpu" else numbers_at_once(device)


def pieces(rows: int, numbers_a_row: int, at_once: int, *, of_few_sizes: bool = False) -> list[slice]:
    """The rows in pieces of at most that many numbers, but of at least one row; `of_few_sizes`: of a power of two."""
    size = max(1, at_once // numbers_a_row)
    size = 1 << (size.bit_length() - 1) if of_few_sizes else size
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

"""Means over everything since the last log line, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Meters:
    """Named weighted means. The names are fixed at the start, so that all processes gather the same numbers."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._sum_and_count = torch.zeros(len(self.names), 2, dtype=torch.float64)

    def add(self, name: str, total: float | Tensor, count: float | Tensor) -> None:
        """Add `count` items that sum to `total` to one mean."""
        self._sum_and_count[self.names.index(name)] += torch.tensor([float(total), float(count)], dtype=torch.float64)

    def drain(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means by name since the last drain, without those that saw nothing; `gather` stacks over processes."""
        over_all = gather(self._sum_and_count[None]).sum(dim=0)
        self._sum_and_count.zero_()
        return {
            name: float(total / count) for name, (total, count) in zip(self.names, over_all, strict=True) if count > 0
        }

"""What an engine measures about itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class RolloutMetrics:
    """What one `generate` call did: tokens, forwards, and seconds by part.

    On CUDA work only begins inside `timing`, so events on the device time it, and `settle` adds up what they say.
    """

    tokens: int = 0
    drafted: int = 0
    forwards: dict[str, int] = field(default_factory=lambda: {"student": 0, "teacher": 0})
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("student", "teacher", "policy", "cache"), 0.0)
    )

    on_cuda: bool = False
    _events: list[tuple[str, Any, Any]] = field(default_factory=list, repr=False)

    @property
    def student_forwards(self) -> int:
        """Forwards of the student, prefills included."""
        return self.forwards["student"]

    @property
    def teacher_forwards(self) -> int:
        """Forwards of the teacher, prefills included."""
        return self.forwards["teacher"]

    def add(self, other: RolloutMetrics) -> None:
        """Add the numbers of another call."""
        self.tokens += other.tokens
        self.drafted += other.drafted
        for model, forwards in other.forwards.items():
            self.forwards[model] = self.forwards.get(model, 0) + forwards
        for part, seconds in other.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @property
    def acceptance(self) -> float:
        """Written tokens per drafted token, 0 to 1."""
        return self.tokens / max(1, self.drafted)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to `part`."""
        if self.on_cuda:
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            yield
            ended.record()
            self._events.append((part, begun, ended))
            return
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def settle(self) -> None:
        """Take in what the events say; it waits for the last of them."""
        if self._events:
            self._events[-1][2].synchronize()
        for part, begun, ended in self._events:
            self.seconds[part] += begun.elapsed_time(ended) / 1e3
        self._events.clear()

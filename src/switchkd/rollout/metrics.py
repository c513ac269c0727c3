"""What an engine measures about itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class RolloutMetrics:
    """What one `generate` call did: tokens, forwards, and seconds by part."""

    tokens: int = 0
    drafted: int = 0
    student_forwards: int = 0
    teacher_forwards: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("student", "teacher", "policy", "cache"), 0.0)
    )

    @property
    def acceptance(self) -> float:
        """Written tokens per drafted token, 0 to 1."""
        return self.tokens / max(1, self.drafted)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

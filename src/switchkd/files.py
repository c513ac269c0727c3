"""Files that are written whole or not at all, and the time that is written into them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: write there, and it takes the place of `path` when the block ends without an error.

    The folder is made. Two processes never share a temporary name. Raises OSError where writing fails; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}.partial")
    try:
        yield partial
        # Without it, a crash of the machine can leave an empty file under the final name.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON. JSON has neither NaN nor infinity: null stands for them, which every reader takes."""
    return json.dumps(_finite_or_null(value), indent=indent, allow_nan=False)


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_null(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite_or_null(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def now() -> str:
    """The time, UTC, to the second, as 2026-11-24T20:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")

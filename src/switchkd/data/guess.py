"""Which columns of a source hold what we need, where they have other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from switchkd.data.rows import SourceRow
from switchkd.data.shapes import SHAPES
from switchkd.errors import UserError

# Names that data sets use, the likeliest first.
_NAMES = {
    "prompt": ("prompt", "question", "instruction", "query", "problem", "input", "user", "article", "document", "source"),
    "completion": (
        "completion", "response", "answer", "output", "solution", "target", "reply", "assistant", "summary", "label",
    ),
    "input": ("input", "context"),
}  # fmt: skip


def guessed_columns(rows: Sequence[SourceRow], origin: str) -> dict[str, str]:
    """Our names of columns, each with the source's; empty where the names are ours. Raises UserError where none fits."""
    seen: dict[str, Any] = {}
    for row in rows:
        for name, value in row.columns.items():
            seen.setdefault(name, value)
    read = next((needed for needed, _ in SHAPES if all(name in seen for name in needed)), ())
    # A prompt alone may have its answer under another name.
    if len(read) == 2 or read in (("messages",), ("conversations",)):
        return {}
    if not read and (chat := next((name for name, value in seen.items() if _is_chat(value)), None)):
        return {"messages": chat}
    prompt = read[0] if read else _named("prompt", seen)
    answer = _named("completion", {name: value for name, value in seen.items() if name != prompt})
    if prompt is None:
        raise UserError(
            f"none of the columns {', '.join(seen) or '(none)'} of {origin} looks like a prompt; write a run file with "
            f"columns: {{prompt: NAME, completion: NAME}} (docs/data.md)"
        )
    if read and answer is None:
        return {}
    if read == ("instruction",):
        found = {"instruction": prompt, "input": _named("input", seen), "output": answer}
    else:
        found = {"prompt": prompt, "completion": answer}
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def _named(ours: str, columns: Mapping[str, Any]) -> str | None:
    by_name = {name.lower().strip(): name for name, value in columns.items() if isinstance(value, str)}
    return next((by_name[name] for name in _NAMES[ours] if name in by_name), None)


def _is_chat(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ({"role", "content"} <= first.keys() or {"from", "value"} <= first.keys())
